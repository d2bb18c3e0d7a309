"""What should be trained beside the shared factors, at which rates? Many settings on all tasks of ``local_long``.

    python -m benchmarks extras pack --folder FOLDER          # backbone and images, for a machine without network
    python -m benchmarks extras run --folder FOLDER --list explore --seconds 200 --workers 4

Settings are judged on images that are neither trained on nor tested: ``dev``, drawn from each task's pool. The rows of
the stage ``explore`` train on 1000 other images of the pool. Those of ``final`` have the training and test images of
the suite (their own seed's 1000, the test set's first 1000), those of ``search`` its 800 and 200. Runs go together in
stacks (:mod:`efft_lab.studies.stacked`); a list is worked off in order, until the time is over.
"""
