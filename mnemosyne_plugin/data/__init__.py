"""Data loaders that a newcomer takes up where the lost worker was.

    loader = mnemosyne_plugin.data.resumable(loader)
    for epoch in range(num_epochs):
        for batch in loader:
            ...

The one line makes the data of a loop exact: the same batches, the same random streams.
The README has the table of the loops that need it. Without `mnemosyne run` the loop
gets what it would get with it, so the line may stay in the script.
"""

from typing import Any

from mnemosyne_plugin import recovery
from mnemosyne_plugin.data.loops import Resumable, positions
from mnemosyne_plugin.data.sources import source_of

__all__ = ["Resumable", "positions", "resumable"]


def resumable(loader: Any, *, catch_up: bool = True) -> Any:
    """Return ``loader`` with a position of its own; use it in place of ``loader``.

    loader: a torch DataLoader, anything with ``state_dict`` and ``load_state_dict``
    (torchdata's StatefulDataLoader), DeepSpeed's loaders, or any other iterable: of
    that a newcomer reads and drops what the lost worker had read.

    catch_up: how the script's loop finds the epoch in which the job is.
    True: it starts at epoch 0, as ``for epoch in range(E)`` does. In a newcomer the
    epochs that are over are empty, so that the loop gets to the right one by itself.
    False: it starts where the job is: at ``engine.global_steps``, or at an epoch that
    it computes. DeepSpeed's RepeatingLoader, and a script that reads ``loader.epoch``
    (``for epoch in range(loader.epoch, E)``), need not say so.

    Call it before or after ``deepspeed.initialize`` or ``attach``; several loaders in
    the same order on every run of the script.
    """
    if isinstance(loader, Resumable):
        loader.catches_up = loader.catches_up and catch_up
        return loader
    if hasattr(loader, "loader") and hasattr(loader, "data_iter"):
        # DeepSpeed's RepeatingLoader, with an iterator of the bare loader in it.
        loader.loader = resumable(loader.loader, catch_up=False)
        loader.data_iter = iter(loader.loader)
        return loader
    source = source_of(loader)
    wrapper = Resumable(source, catches_up=catch_up)
    positions().add(wrapper)
    manager = recovery.current()
    if manager is not None and manager.rank == 0 and not manager.is_setting_up_alone:
        print(f"mnemosyne: data position of {source.description}", flush=True)
    return wrapper
