"""How large should a read() be, and how large the driver's chunks? Does QEMU's 1 MiB come out as enough?

QEMU reads a device's data with a buffer of 1 MiB (hw/vfio/migration.c, VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE). The grid
reads one device, all of whose state moves after the stop, in sizes from 4 KiB to 128 MiB, each double the one before:
where the firmware's SAVE binds, as with mlx5, and where only read() does. *Time to move* is from the device stopped to
its last data loaded (drain, transfer, load), without what finishing the load takes, which no size changes.

Small reads are many. So reads below 128 KiB are of a state of 16 MiB in chunks of 1 MiB: a stream still has several
chunks then. The answer counts the steps up from QEMU's size that take off NO_GAIN or more; no claim is about it.
"""

from experiments.questions.buffer_and_chunk.figures import figures
from experiments.questions.buffer_and_chunk.question import answer, points
from experiments.study.experiment import Experiment

EXPERIMENT = Experiment(
    name="buffer_and_chunk",
    question="How large should a read() and a driver's chunk be: is there a gain above QEMU's 1 MiB?",
    claims=(),
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
)
