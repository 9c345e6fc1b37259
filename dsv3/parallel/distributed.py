"""Many processes as one job: who takes part, found in the environment; meeting points; and failing together.

A job is fail-stop: a process that dies takes the others with it within a heartbeat, and whoever started them starts all
of them again from the newest checkpoint (`experiments/launch_local.py`, a Slurm script that requeues its job, a
Kubernetes JobSet).
"""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import jax
from jax._src.distributed import global_state  # the coordination service has no public handle

from dsv3.config import require

COORDINATOR, NUM_PROCESSES, PROCESS_ID = EXPLICIT = ("DSV3_COORDINATOR", "DSV3_NUM_PROCESSES", "DSV3_PROCESS_ID")
HEARTBEAT, START = "DSV3_HEARTBEAT_SECONDS", "DSV3_START_SECONDS"
HEARTBEAT_SECONDS, START_SECONDS = 60, 300


class Launch(NamedTuple):
    """How this process joins the others. None: left to `jax.distributed` (for devices: one a process, by local rank).

    `method` is jax's cluster_detection_method; no `devices` at all, (), means every visible one.
    """

    method: str | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    devices: tuple[int, ...] | None


def detect(environ: Mapping[str, str]) -> Launch | None:
    """The job that `environ` describes, None for a single process.

    The innermost launcher wins: explicit variables, then Open MPI (mpirun runs inside Slurm's allocation and hands its
    variables on), then a Slurm step, then an indexed Kubernetes job. Raises `UserError` for explicit variables that are
    incomplete or bad, and for a rank outside of its job.
    """
    if any(name in environ for name in EXPLICIT):
        return _explicit(environ)
    if "OMPI_COMM_WORLD_SIZE" in environ and _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        return _member(environ, "ompi", None, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", alone)
    # A batch script or an salloc shell has SLURM_NTASKS too, but only what srun starts has a step.
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        if _number(environ, size, 1) > 1:
            counts = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # 4(x2),3
            own = set(counts) == {"1"} or "SLURM_GPUS_PER_TASK" in environ
            return _member(environ, "slurm", None, size, "SLURM_PROCID", own)
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Launch(None, None, None, _number(environ, "JOB_COMPLETION_INDEX", 0), None)  # size: only its API knows
    return None


def initialise(environ: Mapping[str, str] = os.environ) -> None:
    """Join the job that `environ` describes (`detect`); nothing happens for a single process.

    Call it once, before anything that starts a JAX backend. A process that has been silent for DSV3_HEARTBEAT_SECONDS
    (60) counts as dead and ends the job; processes that are not there after DSV3_START_SECONDS (300) end it too.
    SIGTERM is left to the program: jax's own preemption service, which swallows it, is off.
    """
    job = detect(environ)
    if job is None:
        return
    if job.method == "ompi":  # jax needs it from Open MPI 5 on, and tells older ones apart by this variable
        require("OMPI_MCA_orte_hnp_uri" in environ or find_spec("mpi4py") is not None,
                f"Open MPI 5 does not tell where rank 0 is: pip install mpi4py, or set {', '.join(EXPLICIT)}")
    if job.method is None:
        require(find_spec("kubernetes") is not None, "this is an indexed Kubernetes job, whose size only the package "
                f"kubernetes can find: pip install kubernetes, or set {', '.join(EXPLICIT)}")
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        job.coordinator, job.num_processes, job.process_id,
        local_device_ids=None if job.devices is None else list(job.devices), cluster_detection_method=job.method,
        initialization_timeout=_number(environ, START, 1, START_SECONDS),
        heartbeat_timeout_seconds=_number(environ, HEARTBEAT, 1, HEARTBEAT_SECONDS))


def is_main() -> bool:
    """Whether this is process 0: the one that prepares data and writes metrics. True for a single process."""
    return jax.process_index() == 0


def barrier(name: str, timeout_s: float) -> None:
    """Wait until every process is here, without a device: through the coordination service, so minutes are fine.

    Raises `TimeoutError` on the processes that are here when others are missing after `timeout_s` seconds.
    """
    if global_state.client is None:
        return
    try:
        global_state.client.wait_at_barrier(name, int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        counts = re.search(r"(\d+)/(\d+)", str(error))
        here = f"{counts[1]} of {counts[2]}" if counts else "not all"
        raise TimeoutError(f"{here} processes reached {name!r} within {timeout_s:g} s") from error


@contextmanager
def fail_fast() -> Iterator[None]:
    """Around a launcher's work: in a job of many processes, one that fails ends at once.

    Python's own way out would wait in jax's shutdown barrier for processes that wait in a collective for this one.
    """
    try:
        yield
    except BaseException as error:
        done = isinstance(error, SystemExit) and error.code in (None, 0)
        if done or not jax.distributed.is_initialized():
            raise
        try:
            if not isinstance(error, SystemExit):
                traceback.print_exception(error)
            elif isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also where the last words do not fit on the disk
            os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _explicit(environ: Mapping[str, str]) -> Launch:
    missing = [name for name in EXPLICIT if name not in environ]
    given = [name for name in EXPLICIT if name in environ]
    require(not missing, f"{' and '.join(given)} set, but not {' and '.join(missing)}; set all three, or none of them")
    coordinator = environ[COORDINATOR]
    host, colon, port = coordinator.rpartition(":")
    require(host != "" and colon == ":" and port.isdigit() and 0 < int(port) < 65536,
            f"{COORDINATOR}={coordinator} is not host:port")
    return _member(environ, "deactivate", coordinator, NUM_PROCESSES, PROCESS_ID, own_devices=True)


def _member(environ, method, coordinator, size_name, rank_name, own_devices) -> Launch:
    """`own_devices`: every device that this process sees is its own."""
    size, rank = _number(environ, size_name, 1), _number(environ, rank_name, 0)
    require(rank < size, f"{rank_name}={rank} is outside of {size_name}={size}; ranks count from 0")
    chosen = "JAX_LOCAL_DEVICE_IDS" in environ  # jax reads it, unless told otherwise
    return Launch(method, coordinator, size, rank, () if own_devices and not chosen else None)


def _number(environ: Mapping[str, str], name: str, least: int, default: int | None = None) -> int:
    require(name in environ or default is not None, f"{name} is not set, but the launcher's other variables are")
    text = environ.get(name, str(default))
    require(text.isascii() and text.isdigit() and int(text) >= least,
            f"{name}={text} is not a whole number from {least} on")
    return int(text)
