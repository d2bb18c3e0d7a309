"""Study which parameters should be trained in addition to EFFT's shared factors, and at which learning rates.

    python -m benchmarks extras pack --folder FOLDER          # packs backbone and images for a machine without network
    python -m benchmarks extras run --folder FOLDER --list explore --seconds 200 --workers 4
    python -m benchmarks extras summary                       # prints a table of the results

The additional parameters, such as biases and norms, are called extras. A setting is a method with its ranks, learning
rates and extras. The study uses the tasks and the recipe of the suite ``local_long``. A run trains one setting on one
task with one seed. There are three stages:

- ``explore`` compares many settings. A run trains on 1000 training or validation images of the suite, which its seed
  selects. It is evaluated on ``dev``, which consists of up to 800 other such images, and on the test images.
- ``search`` selects settings on the suite's images. A run trains on the 800 training images of its seed and is
  evaluated on its 200 validation images.
- ``final`` trains on these 1000 images together and is evaluated on the suite's 1000 test images.

Runs of the same structure advance together in one stack (:mod:`efft_lab.studies.stacked`). A list of settings is
processed in order until the given time is over.
"""
