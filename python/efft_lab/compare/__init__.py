"""Methods side by side: tasks x methods x seeds from one file, resumable, with a report.

    efft compare --suite local --quick --jobs 2      # runs what is not there yet
    efft compare --suite local --quick --report      # tables, tests and pictures of what is there

`suite` reads the file, `agenda` says which runs it means, `store` keeps their results, `runner` and `worker` do them,
`scores` and `statistics` sum them up, `report` and `plots` show them.
"""
