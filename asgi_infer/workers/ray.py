"""The model lives in a Ray actor, on whichever machine of the cluster has room for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from .._checks import check_count
from ._protocol import ModelSpec
from ._remote import RemoteWorker

if TYPE_CHECKING:
    from ._ray_replica import RayReplica

_OURS = frozenset({"max_concurrency", "max_restarts", "max_task_retries"})


@dataclass(frozen=True)
class RayWorker(RemoteWorker):
    """Keep each of ``replicas`` models in an actor of a Ray cluster. Needs the extra ``ray``.

    Connect to the cluster first, with ``ray.init(...)``. Where an actor runs, when machines come
    and go, and what it may use is up to Ray; the runner keeps its queue, deadlines, batches and
    statistics. Functions, arguments and results are pickled by Ray's cloudpickle, and arrays go
    through its object store: they arrive read-only. The package must be installed on each node.

    By default an actor reserves as many CPUs as ``NativePolicy.threads`` says, if that is set.
    Ray sets ``OMP_NUM_THREADS`` to the CPUs reserved (1 if none are), and the policy does not go
    beyond that: say how many threads the model is to have.

    :param replicas: how many models there are, and calls that run at once
    :param options: of the actors: ``num_cpus``, ``num_gpus``, ``resources``, ``runtime_env``,
        ``scheduling_strategy`` and so on, as of ``ray.actor.ActorClass.options``
    :param hard_timeout: seconds after which the actor of a running call is killed
    :param startup_timeout: seconds that finding a place for an actor and loading may take
    :param retry_crashed: run a call again, once, whose actor died. By default it is not
    :param restart: what is done about actors that die
    :raises ModuleNotFoundError: Ray is not installed
    :raises ValueError: an option is the worker's own to set, or a number makes no sense
    """

    replicas: int = 1
    _: KW_ONLY
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("replicas", self.replicas)
        taken = sorted(_OURS.intersection(self.options))
        if taken:
            raise ValueError(
                f"{', '.join(taken)}: an actor of a runner takes one call at a time, and what is "
                f"done about crashes is said by restart and retry_crashed"
            )
        import_replica()

    def replica(self, spec: ModelSpec, number: int, /) -> RayReplica:
        """An actor's end on this side."""
        del number  # they are alike: Ray chooses the places
        return import_replica()(spec, self)


def import_replica() -> type[RayReplica]:
    """The class that knows Ray, which takes half a second to import.

    :raises ModuleNotFoundError: with what to install
    """
    try:
        from ._ray_replica import RayReplica
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "ray":
            raise
        raise ModuleNotFoundError(
            "RayWorker needs Ray: pip install 'asgi-infer[ray]'", name="ray"
        ) from error
    return RayReplica
