"""Compare methods on several tasks with several seeds.

    efft compare --suite local --quick --jobs 2      # executes the runs that have no result yet
    efft compare --suite local --quick --report      # writes tables, tests and plots of the results

A suite describes a comparison: its tasks, methods, seeds and settings. It is stored in a JSON file. The module
``suite`` reads the file, ``agenda`` lists the runs, ``runner`` and ``worker`` execute the runs, ``store`` saves the
results, ``scores`` and ``statistics`` summarize the results, and ``report`` and ``plots`` present them.
"""
