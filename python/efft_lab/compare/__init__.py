"""Methods side by side: tasks x methods x seeds from one file, resumable, with a report.

    efft compare --suite local --quick --jobs 2      # does the runs that have no result yet
    efft compare --suite local --quick --report      # writes tables, tests and pictures of the results

``suite`` reads the file, ``agenda`` lists its runs, ``runner`` and ``worker`` do them, ``store`` keeps their results,
``scores`` and ``statistics`` summarize them, ``report`` and ``plots`` present them.
"""
