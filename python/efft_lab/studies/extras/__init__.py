"""Study what should be trained beside the shared factors, and at which rates, on all tasks of ``local_long``.

    python -m benchmarks extras pack --folder FOLDER          # packs backbone and images for a machine without network
    python -m benchmarks extras run --folder FOLDER --list explore --seconds 200 --workers 4

Settings are judged on images that are used neither for training nor for tests: ``dev``, drawn from each task's pool.
The rows of the stage ``explore`` train on 1000 other images of the pool. Rows of ``final`` use the training and test
images of the suite (the 1000 of their seed and the first 1000 of the test set). Rows of ``search`` use the suite's 800
training and 200 validation images. Runs advance together in stacks (:mod:`efft_lab.studies.stacked`). A list of
settings is processed in order until the time is over.
"""
