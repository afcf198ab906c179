"""Diagnoses as the doctor could make them, without measuring anything."""

from __future__ import annotations

import random
from dataclasses import replace

from asgi_infer.doctor._results import Arm, Diagnosis, Finding, Machine, ThreadTrace

TITLES = {
    "script": "script",
    "def": "def endpoint",
    "async-def": "async def endpoint",
    "executor": "ThreadPoolExecutor(1)",
    "runner": "InferenceRunner",
    "runner-retain": "InferenceRunner, retain_memory",
}

MACHINE = Machine(
    system="Linux 6.8 x86_64",
    python="3.12.8",
    cpus=2,
    cores=1,
    quota=None,
    pressure=0.002,
    others=0.02,
    stolen=0.0,
    noisy=False,
    runtimes=("libgomp (scikit-learn)", "OpenBLAS (numpy)"),
)

TWO_POOLS = Finding(
    key="two-pools",
    severity="problem",
    headline="two OpenMP pools: 1313 sleeps per call; load the model on the runner: 4.0x",
    detail="The model was loaded on the main thread and is called on another one, and each of "
    "them keeps a pool of 2 threads for ever. libgomp sees more threads than CPUs, so the threads "
    "of both pools sleep at each barrier instead of spinning: 1313 sleeps per call, 2 in the "
    "script. Load the model, warm it up and call it on one thread.",
    lines=(
        "from asgi_infer import InferenceRunner, ModelRef, inference_lifespan",
        "",
        "runner = InferenceRunner(load_model)",
        "app = FastAPI(lifespan=inference_lifespan(runner))",
        "",
        '@app.post("/predict")',
        "async def predict(image: Image) -> Answer:",
        "    return await runner.run(runner.model.predict, image.pixels)",
    ),
)
LOOP_BLOCKED = Finding(
    key="loop-blocked",
    severity="problem",
    headline="async def blocks the event loop: /health takes 465 ms",
    detail="The call runs on the thread of the event loop, which answers nobody else meanwhile. "
    "Load balancers and liveness probes give up on a server like that.",
)
PAGE_FAULTS = Finding(
    key="page-faults",
    severity="advice",
    headline="page faults cost 8 % of a call: retain_memory makes it 1.06x",
    detail="Each call gives 2.1 MiB back to the kernel and fetches them again.",
    lines=("runner = InferenceRunner(load_model, native=NativePolicy(retain_memory=True))",),
)


def trace(name: str, python: str | None, share: float, *, seed: int = 0) -> ThreadTrace:
    """A thread that uses about that share of a CPU for three seconds."""
    dice = random.Random(f"{name!r}{seed}")
    cpu = (min(1.0, max(0.0, share + dice.gauss(0, 0.04 * (0 < share < 0.98)))) for _ in range(30))
    return ThreadTrace(name=name, python=python, cpu=tuple(cpu))


def arm(
    key: str,
    calls: int,
    *,
    switches: float,
    faults: float = 520.0,
    latency: float = 0.08,
    health: float | None = 0.004,
    threads: tuple[ThreadTrace, ...] = (),
) -> Arm:
    """An arm of three seconds with so many calls; the counts are for each call."""
    dice = random.Random(key)
    cores = sum(sum(thread.cpu) for thread in threads) / 30
    asked = 0 if health is None else 60
    return Arm(
        key=key,
        title=TITLES.get(key, key.removeprefix("threads-")),
        seconds=3.0,
        latencies=tuple(latency * dice.lognormvariate(0, 0.12) for _ in range(calls)),
        cpu_seconds=3 * cores,
        voluntary_switches=round(switches * calls),
        involuntary_switches=calls // 3,
        minor_faults=round(faults * calls),
        system_seconds=0.2 * cores if switches > 100 else 0.05 * cores,
        queued_seconds=0.4 * cores if switches > 100 else 0.02,
        throttled_periods=0,
        throttled_seconds=0.0,
        health=tuple((health or 0) * dice.betavariate(1.2, 2) for _ in range(asked)),
        threads=threads,
        interval=0.1,
    )


def throttled_arms() -> tuple[Arm, ...]:
    """A scikit-learn model of two threads, whose second pool throttles it."""
    loop = trace("python", "MainThread", 0.03)
    return (
        arm(
            "script",
            300,
            switches=0.02,
            latency=0.01,
            health=None,
            threads=(trace("python", "MainThread", 0.99), trace("python", None, 0.98, seed=1)),
        ),
        arm(
            "def",
            75,
            switches=1313,
            latency=0.31,
            health=0.025,
            threads=(
                trace("python", "MainThread", 0.06),
                *(trace("AnyIO worker th", "AnyIO worker thread", s) for s in (0.58, 0.5)),
                *(trace("AnyIO worker th", None, s, seed=n) for n, s in enumerate((0.55, 0.44))),
                trace("python", None, 0.0),
            ),
        ),
        arm(
            "async-def",
            270,
            switches=2.1,
            latency=0.088,
            health=0.465,
            threads=(trace("python", "MainThread", 0.97), trace("python", None, 0.9)),
        ),
        arm(
            "executor",
            78,
            switches=1248,
            latency=0.3,
            health=0.005,
            threads=(
                loop,
                trace("ThreadPoolExec", "ThreadPoolExecutor-0_0", 0.62),
                trace("ThreadPoolExec", None, 0.52),
                trace("python", None, 0.01),
            ),
        ),
        arm(
            "runner",
            300,
            switches=4.6,
            latency=0.079,
            health=0.006,
            threads=(
                loop,
                trace("asgi_infer", "asgi_infer", 0.97),
                trace("asgi_infer", None, 0.96),
            ),
        ),
        arm(
            "runner-retain",
            318,
            switches=4.5,
            faults=1.2,
            latency=0.075,
            health=0.006,
            threads=(
                loop,
                trace("asgi_infer", "asgi_infer", 0.97),
                trace("asgi_infer", None, 0.97),
            ),
        ),
    )


def throttled() -> Diagnosis:
    """The case that the doctor exists for."""
    sweep = tuple(
        arm(f"threads-{n}", calls, switches=s, threads=(trace("asgi_infer", "asgi_infer", used),))
        for n, calls, s, used in ((1, 171, 1.1, 0.99), (2, 300, 4.6, 1.0), (4, 92, 480.0, 0.8))
    )
    return Diagnosis(
        target="digits.model:Model",
        call="predict",
        clients=8,
        machine=MACHINE,
        arms=throttled_arms(),
        sweep=sweep,
        findings=(TWO_POOLS, LOOP_BLOCKED, PAGE_FAULTS),
    )


def noisy() -> Diagnosis:
    """The same on a busy machine in a container with a quota, which it used up."""
    machine = replace(
        MACHINE, noisy=True, pressure=0.31, others=0.8, stolen=0.1, quota=1.5, runtimes=()
    )
    arms = tuple(replace(each, throttled_periods=12) for each in throttled_arms())
    note = Finding(key="noise", severity="advice", headline="busy machine", detail="")
    return replace(throttled(), machine=machine, arms=arms, findings=(note, TWO_POOLS))


def one_arm() -> Diagnosis:
    """The script alone, and all is well."""
    fine = Finding(key="healthy", severity="fine", headline="nothing is throttled", detail="")
    return replace(throttled(), arms=throttled_arms()[:1], sweep=(), findings=(fine,))


def no_calls() -> Diagnosis:
    """No call ended in time, and nothing was seen of any thread."""
    arms = tuple(
        replace(each, latencies=(), health=(), threads=(), cpu_seconds=0.0)
        for each in throttled_arms()
    )
    sweep = tuple(replace(each, latencies=(), cpu_seconds=0.0) for each in throttled().sweep[:2])
    return replace(throttled(), arms=arms, sweep=sweep, findings=())


def many_threads() -> Diagnosis:
    """64 threads, all of them busy."""
    threads = tuple(trace(f"worker-{n}", None, 0.2 + n / 100) for n in range(64))
    arms = tuple(replace(each, threads=threads) for each in throttled_arms())
    return replace(throttled(), arms=arms)


def hostile() -> Diagnosis:
    """Names that try to be markup, mathematics, terminal control, and far too long."""
    name = '<script>alert("1")</script> & [bold]$x^2$ \x1b[31m\n' + "very_long_name_" * 12
    arms = tuple(
        replace(
            each,
            title=name,
            threads=(trace(name, name, 0.7), trace("\u4e2d\u6587 \udcff", None, 0.5)),
        )
        for each in throttled_arms()
    )
    finding = replace(
        TWO_POOLS, key=name, severity=name, headline=name, detail=name, lines=(name,)
    )
    machine = replace(MACHINE, system=name, python=name, runtimes=(name,))
    return Diagnosis(
        target=name,
        call=name,
        clients=1,
        machine=machine,
        arms=arms,
        sweep=tuple(replace(each, title=name) for each in throttled().sweep[:1]),
        findings=(finding,),
    )


def uncounted() -> Diagnosis:
    """The same where nothing can be read of any thread."""
    arms, sweep = (
        tuple(
            replace(
                each,
                cpu_seconds=0.0,
                voluntary_switches=0,
                involuntary_switches=0,
                minor_faults=0,
                system_seconds=0.0,
                queued_seconds=0.0,
                threads=(),
            )
            for each in measured
        )
        for measured in (throttled_arms(), throttled().sweep)
    )
    machine = replace(MACHINE, counted=False, runtimes=())
    return replace(throttled(), machine=machine, arms=arms, sweep=sweep, findings=())
