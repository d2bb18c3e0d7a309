"""Compare methods on tasks with several seeds, as one file describes it. Comparisons are resumable and have a report.

    efft compare --suite local --quick --jobs 2      # executes the runs that have no result yet
    efft compare --suite local --quick --report      # writes tables, tests and plots of the results

A suite is the content of such a file. The module ``suite`` reads the file, ``agenda`` lists the runs, ``runner`` and
``worker`` execute the runs, ``store`` saves the results, ``scores`` and ``statistics`` summarize the results, and
``report`` and ``plots`` present them.
"""
