"""CUDA graphs that hold operations of our groups.

A graph has in it what moved a group's tensors when it was captured. Where that is made
anew, in a repair, the graph is dead, and says so instead of hanging.
"""

import functools
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mnemosyne_plugin.ccl import _C
from mnemosyne_plugin.ccl.devices import DeviceGroup, device_groups
from mnemosyne_plugin.ccl.mesh import Mesh
from mnemosyne_plugin.errors import GraphLost

logger = logging.getLogger(__name__)

# A launch may wait for the device itself, which waits for an abort.
_LAUNCH_S = 1.0


@dataclass(slots=True)
class _Captured:
    """What a graph holds."""

    groups: Mapping[DeviceGroup, int]
    """With the life of each that the capture has met."""
    is_whole: bool
    """Not if a failure has come while it was captured."""
    launched: Any = None
    """An event behind its last launch."""


class Graphs:
    """Those of this process. Any thread."""

    def __init__(
        self,
        mesh: Mesh,
        find: Callable[[], list[DeviceGroup]] = device_groups,
        mark: Callable[[], Any] = lambda: _mark(),
    ) -> None:
        """mark: returns an event behind what a device was given last."""
        self._mesh = mesh
        self._find = find
        self._mark = mark
        self._captured: weakref.WeakKeyDictionary[Any, _Captured] = (
            weakref.WeakKeyDictionary()
        )
        self._before: dict[int, int] = {}
        self._num_launches: Counter[tuple[int, int]] = Counter()
        # A failure finds a graph launched, or the graph finds the failure.
        self._launching = threading.Lock()

    def watch(self, graph: Any = torch.cuda.CUDAGraph) -> None:
        """See what is captured in graphs of this class, and launched."""
        begin, end, replay = graph.capture_begin, graph.capture_end, graph.replay

        @functools.wraps(begin)
        def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
            self._captured.pop(graph, None)
            _C.set_capturing(True)
            # Behind this no thread asks for a group's works.
            self._before = {each.key: each.num_captured for each in self._find()}
            try:
                begin(graph, *args, **kwargs)
            except BaseException:
                _C.set_capturing(False)
                raise

        @functools.wraps(end)
        def capture_end(graph: Any) -> None:
            try:
                end(graph)
            finally:
                _C.set_capturing(False)
                self._note(graph)

        @functools.wraps(replay)
        def launch(graph: Any) -> None:
            self._launch(graph, replay)

        graph.capture_begin, graph.capture_end = capture_begin, capture_end
        graph.replay = launch

    def num_launches(self, group: DeviceGroup) -> int:
        """Return how often operations of it have been asked for by graphs."""
        return self._num_launches[group.key, group.standing()[0]]

    def in_flight(self) -> Sequence[DeviceGroup]:
        """Return the groups of graphs that the device has not done."""
        is_ours = self._launching.acquire(timeout=_LAUNCH_S)
        try:
            captured = list(self._captured.values())
        finally:
            if is_ours:
                self._launching.release()
        return [g for each in captured if not _is_done(each) for g in each.groups]

    def _note(self, graph: Any) -> None:
        before = self._before
        groups = {
            group: group.standing()[0]
            for group in self._find()
            if group.num_captured > before.get(group.key, 0)
        }
        is_whole = self._mesh.failure() is None
        if not groups and is_whole:
            return
        self._captured[graph] = _Captured(groups, is_whole)
        if is_whole:
            logger.warning(
                "rank=%d a CUDA graph holds operations of %s: if a rank of it is lost, "
                "the job ends, unless the script captures the graph again",
                self._mesh.rank,
                _names(groups),
            )

    def _launch(self, graph: Any, replay: Callable[[Any], None]) -> None:
        captured = self._captured.get(graph)
        if captured is None:
            replay(graph)
            return
        with self._launching:
            failure = self._mesh.failure()
            if failure is not None:
                if self._mesh.absorbs_failure:
                    return  # the step is doomed
                raise failure
            self._check(captured)
            replay(graph)
            captured.launched = self._mark()
            self._num_launches.update(
                (group.key, life) for group, life in captured.groups.items()
            )

    def _check(self, captured: _Captured) -> None:
        groups = captured.groups.items()
        dead = [group for group, life in groups if group.standing()[0] != life]
        if not captured.is_whole or dead:
            raise GraphLost(
                f"a CUDA graph cannot be replayed: in the repair of epoch "
                f"{self._mesh.epoch} what moves the tensors of {_names(dead)} was made "
                "anew; capture it again, or leave collectives out of graphs"
            )


def _names(groups: Any) -> str:
    return ", ".join(f"group {group.group_name}" for group in groups) or "its groups"


def _mark() -> Any:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _is_done(captured: _Captured) -> bool:
    try:
        return captured.launched is None or bool(captured.launched.query())
    except RuntimeError:
        return False  # of a device that is broken
