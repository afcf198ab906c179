"""Facts about the benchmarks: their arithmetic, their report, and that every arm still runs."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from asgi_infer.native.noise import Noise
from asgi_infer.native.procfs import ThreadCounters, all_thread_counters
from benchmarks import __main__ as program
from benchmarks import _figure, _http, _rival, _served, digits, full_cpu, isolation, rivals, web
from benchmarks._children import Child, ChildError, once
from benchmarks._figure import (
    QUICK,
    Benchmark,
    Comparison,
    Figure,
    Metric,
    Result,
    Round,
    Sample,
    Scale,
    Spread,
    Unavailable,
    one_by_one,
)
from benchmarks._load import Load, script, serve
from benchmarks._models import PACKAGES
from benchmarks._report import as_json, table
from benchmarks._rival import RivalError
from benchmarks._usage import Usage, total, used_between

QUIET = Noise(pressure=0.0, others=0.0, stolen=0.0)
BUSY = Noise(pressure=0.2, others=0.5, stolen=0.0)
TINY = Scale(seconds=0.05, warmup=0.0, passes=1, calls=64, million=1100, iterations=0)

FIGURES = [figure for figures in program.SETS.values() for figure in figures]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")


def figure(*comparisons: Comparison) -> Figure:
    """Two arms, one metric."""
    return Figure(
        name="example",
        title="two arms",
        arms=["ours", "theirs"],
        metrics=[Metric("calls", "calls/s"), Metric("cpu", "CPU %", digits=0)],
        comparisons=comparisons,
        steps=one_by_one(
            {"ours": lambda scale: {"calls": scale.seconds}, "theirs": lambda _: {"calls": 1.0}}
        ),
    )


def result(*comparisons: Comparison, noise: Noise = QUIET) -> Result:
    """Three rounds. The ratios are 2, 0.5 and 3; that of the medians would be 1.5."""
    pairs = [(20.0, 10.0), (30.0, 60.0), (60.0, 20.0)]
    rounds: list[Round] = [
        {"ours": {"calls": ours, "cpu": 99.6}, "theirs": {"calls": theirs}}
        for ours, theirs in pairs
    ]
    return Result(figure(*comparisons), rounds, [noise] * 3)


# -- arithmetic --------------------------------------------------------------------------------


def test_a_cell_is_the_median_of_the_rounds_with_their_range() -> None:
    """Three rounds give their middle value, the smallest and the largest."""
    assert result().spread("ours", "calls") == Spread(median=30.0, low=20.0, high=60.0)


def test_a_metric_that_an_arm_does_not_have_is_none() -> None:
    """An arm without a metric has an empty cell, not a zero."""
    assert result().spread("theirs", "cpu") is None


def test_ratios_are_taken_within_each_round() -> None:
    """The ratio is the median of the rounds' ratios, not the ratio of medians."""
    measured = result().compare(Comparison("calls", "ours", "theirs"))
    assert measured == Spread(median=2.0, low=0.5, high=3.0)


def test_a_comparison_without_another_arm_is_the_metric_itself() -> None:
    """A bound can be set on a figure as it is."""
    assert result().compare(Comparison("calls", "ours")) == Spread(30.0, 20.0, 60.0)


def test_a_ratio_to_nothing_is_infinite() -> None:
    """An alternative that served no call at all does not stop the report."""
    measured = {"ours": {"calls": 1.0}, "theirs": {"calls": 0.0}}
    assert Comparison("calls", "ours", "theirs").value(measured) == math.inf


@pytest.mark.parametrize(
    ("comparison", "value", "reached", "target"),
    [
        (Comparison("calls", "ours", at_least=3.0), 3.0, True, ">= 3"),
        (Comparison("calls", "ours", at_least=3.0), 2.99, False, ">= 3"),
        (Comparison("calls", "ours", at_most=0.35), 0.35, True, "<= 0.35"),
        (Comparison("calls", "ours", at_most=0.35), 0.36, False, "<= 0.35"),
        (Comparison("calls", "ours"), 1.0, None, "-"),
    ],
)
def test_a_bound_is_reached_from_its_own_side(
    comparison: Comparison, value: float, reached: bool | None, target: str
) -> None:
    """Bounds are inclusive; without one there is nothing to reach."""
    assert comparison.reached(value) is reached
    assert comparison.target == target


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 50), (99, 99), (100, 100)])
def test_a_percentile_is_one_of_the_values(percent: float, value: int) -> None:
    """The 99th percentile of 1 to 100 is 99."""
    assert _http.percentile(range(100, 0, -1), percent) == value


class Others:
    """Other processes, busy in the measurements and moments that a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noises: list[Noise]) -> None:
        self.noises = noises
        self.moments = 0
        monkeypatch.setattr(_figure, "NoiseMeter", lambda pressure: self)
        monkeypatch.setattr(_figure, "quiet_moment", self.moment)

    def moment(self) -> Noise:
        self.moments += 1
        return QUIET

    def read(self) -> Noise:
        return self.noises.pop(0)


def test_every_round_is_measured_at_the_scale_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounds asked for are made of one step for each arm, each with a reading of the noise."""
    others = Others(monkeypatch, [QUIET] * 4)
    measured = Benchmark(figure(), replace(TINY, seconds=0.5)).run(2)
    assert [each["ours"]["calls"] for each in measured.rounds] == [0.5, 0.5]
    assert measured.noise == [QUIET] * 4
    assert others.moments == 4


def test_what_others_have_spoilt_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is repeated, while patience lasts, until nobody else was busy."""
    Others(monkeypatch, [QUIET, BUSY, BUSY, QUIET])
    measured = Benchmark(figure(), TINY, patience=60.0).run(1)
    assert measured.repeated == 2
    assert measured.noise == [QUIET, QUIET]


def test_without_patience_spoilt_figures_are_kept_and_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that is never quiet still gets its figures, which say so."""
    Others(monkeypatch, [BUSY, QUIET])
    measured = Benchmark(figure(), TINY).run(1)
    assert measured.repeated == 0
    assert "BUSY in 1 of 2 measurements" in table(measured)


def test_a_busy_moment_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step starts while others are busy, as long as patience lasts."""
    Others(monkeypatch, [QUIET, QUIET])
    moments = iter([BUSY, BUSY, QUIET, QUIET])
    monkeypatch.setattr(_figure, "quiet_moment", lambda: next(moments))
    assert len(Benchmark(figure(), TINY, patience=60.0).run(1).rounds) == 1
    assert list(moments) == []


# -- the report --------------------------------------------------------------------------------


def test_the_table_shows_medians_ranges_and_verdicts() -> None:
    """Every arm has a row, every comparison its target and whether it is reached."""
    slow = Comparison("calls", "ours", "theirs", at_least=3)
    fast = Comparison("calls", "ours", at_most=30)
    lines = [" ".join(line.split()) for line in table(result(slow, fast)).splitlines()]
    assert "ours 30.0 (20.0-60.0) 100" in lines
    assert "theirs 20.0 (10.0-60.0) -" in lines
    assert "calls/s: ours / theirs 2.00 (0.50-3.00) >= 3 NO" in lines
    assert "calls/s: ours 30.00 (20.00-60.00) <= 30 yes" in lines


@pytest.mark.parametrize(("noise", "verdict"), [(QUIET, "quiet"), (BUSY, "BUSY in 3 of 3")])
def test_the_table_says_whether_the_machine_was_busy(noise: Noise, verdict: str) -> None:
    """A reader sees at once which figures others have spoilt."""
    assert f"machine {verdict}" in table(result(noise=noise))


def test_the_json_holds_every_round() -> None:
    """The file is enough to compute everything in the table anew."""
    comparison = Comparison("calls", "ours", "theirs", at_least=3)
    kept = json.loads(json.dumps(as_json(result(comparison, noise=BUSY))))
    assert [each["ours"]["calls"] for each in kept["rounds"]] == [20.0, 30.0, 60.0]
    assert kept["arms"]["ours"]["calls"] == {"median": 30.0, "low": 20.0, "high": 60.0}
    assert kept["comparisons"][0]["reached"] is False
    assert kept["machine_busy"] is True
    assert kept["environment"]["packages"]["asgi-infer"] != "not installed"


def test_an_arm_that_can_not_be_measured_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The report has no figure for it, says why, and holds nothing against it."""
    Others(monkeypatch, [QUIET] * 4)

    def missing(scale: Scale) -> Sample:
        raise Unavailable("it is not installed")

    both = figure(Comparison("calls", "ours", "theirs", at_least=3), Comparison("calls", "theirs"))
    arms = one_by_one({"ours": lambda _: {"calls": 1.0}, "theirs": missing})
    measured = Benchmark(replace(both, steps=arms), TINY).run(2)
    lines = [" ".join(line.split()) for line in table(measured).splitlines()]
    assert "theirs was not measured: it is not installed" in lines
    assert "theirs - -" in lines
    assert "calls/s: ours / theirs - >= 3 -" in lines
    kept = json.loads(json.dumps(as_json(measured)))
    assert kept["unavailable"] == {"theirs": "it is not installed"}
    assert [each["measured"] for each in kept["comparisons"]] == [None, None]


def test_a_model_whose_package_is_missing_can_not_be_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is found out before any process starts, and the message says how to get it."""
    monkeypatch.setitem(PACKAGES, "temporaries", "no_such_package")
    with pytest.raises(Unavailable, match=r"no_such_package.*make bench-full-cpu"):
        script("temporaries", QUICK)


# -- choosing ----------------------------------------------------------------------------------


def test_a_name_picks_a_figure_or_a_family() -> None:
    """``handoff`` stands for all of its loops; no name stands for everything."""
    assert [each.name for each in program.chosen(["nice"])] == ["nice"]
    assert len(program.chosen(["handoff"])) == 3
    assert program.chosen([]) == program.SETS["default"]
    assert program.chosen([], "full-cpu") == program.SETS["full-cpu"]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    """A typing error costs no benchmark."""
    with pytest.raises(SystemExit, match=r"no figure 'hand'.*digits"):
        program.chosen(["million", "hand"])


def test_the_program_prints_a_table_and_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each figure gets a file, and ``--json`` gets them all."""
    monkeypatch.setitem(program.SETS, "default", [figure()])
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    program.main(
        [
            "example",
            "--quick",
            "--rounds",
            "1",
            "--patience",
            "0",
            "--json",
            str(tmp_path / "all.json"),
        ]
    )
    assert f"ours    {QUICK.seconds}" in capsys.readouterr().out
    own = json.loads((tmp_path / "example.json").read_text())
    assert [own] == json.loads((tmp_path / "all.json").read_text())


# -- the client --------------------------------------------------------------------------------


def test_a_response_is_whole_once_its_body_is() -> None:
    """A response may come in pieces of any size."""
    response = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello, world"
    assert [end for end in range(len(response) + 1) if _http.is_whole(response[:end])] == [
        len(response)
    ]


def test_a_response_that_is_no_success_ends_the_measurement() -> None:
    """A server that refuses calls is not a fast one."""
    with pytest.raises(ConnectionError, match="503"):
        _http.is_whole(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")


# -- the system --------------------------------------------------------------------------------


def counters(cpu: float, switches: int, faults: int) -> ThreadCounters:
    """A reading of one thread; what else there is in it does not matter here."""
    return ThreadCounters(
        name="thread",
        on_cpu=cpu,
        queued=0.0,
        voluntary_switches=switches,
        involuntary_switches=0,
        minor_faults=faults,
        major_faults=0,
        system_time=0.0,
        niceness=0,
        cpus="0",
    )


def test_what_threads_used_is_the_difference_of_two_readings() -> None:
    """A thread that came in between counts from zero; one that has gone counts for nothing."""
    before = {1: counters(1.0, 10, 3), 2: counters(0.5, 5, 1)}
    used = used_between(before, {1: counters(3.0, 15, 5), 3: counters(0.25, 7, 1)})
    assert used == {1: Usage(2.0, 5, 2), 3: Usage(0.25, 7, 1)}
    assert total(used.values()) == Usage(2.25, 12, 3)


@on_linux
def test_a_child_is_told_asked_and_counted() -> None:
    """What a child's threads use is read while it lives."""
    with Child("_script", "--seconds", "0.2") as child:
        assert child.ask() == {"event": "ready"}
        before = all_thread_counters(child.pid)
        child.tell()
        assert child.ask()["calls"] > 0
        used = used_between(before, all_thread_counters(child.pid))
    assert used[child.pid].cpu > 0


def test_a_child_that_ends_early_is_an_error() -> None:
    """The parent does not wait for an answer that will never come."""
    with pytest.raises(ChildError, match=r"exit status 2 of .*_http"):
        once("_http", "--no-such-option")


class Rival:
    """A server of two processes that counts its threads, answers POSTs, and ends on Ctrl-C."""

    PROGRAM = """
import http.server, os, sys, time
if os.fork() == 0:
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(int(sys.argv[2]))
        self.end_headers()
    def log_message(self, *_):
        pass
print("a word", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

    def __init__(self, status: int = 200) -> None:
        port = _rival.free_port()
        command = [sys.executable, "-c", self.PROGRAM, str(port), str(status)]
        self.server = _rival.RivalServer(command, port, "/predict")


@on_linux
def test_all_processes_of_a_rival_are_counted_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its children that it leaves behind as well."""
    monkeypatch.setattr(_rival, "_PATIENCE", 4.0)
    with Rival().server as server:
        threads = server.read()
        assert len(threads) == 2
    assert server.read() == {}
    assert not any(psutil.pid_exists(pid) for pid in threads)


@on_linux
def test_a_rival_that_does_not_come_up_says_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last word is in the error, and nothing of it is left."""
    monkeypatch.setattr(_rival, "_PATIENCE", 0.5)
    with pytest.raises(RivalError, match="does not answer /predict: a word"), Rival(500).server:
        pass


def test_a_rival_that_can_not_be_installed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installer's last word is the reason."""
    monkeypatch.setattr(_rival, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[dependency-groups]\nrival-x = ['./missing']\n")
    with pytest.raises(RivalError, match=r"can't be installed: .*missing"):
        _rival.environment("x")
    assert not (tmp_path / ".venv-bench-x" / ".installed").exists()


def test_a_rival_is_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not made again, until other packages are asked for."""
    runs: list[str] = []
    monkeypatch.setattr(_rival, "ROOT", tmp_path)
    monkeypatch.setattr(_rival, "_run", lambda command: runs.append(command[2]))
    (tmp_path / ".venv-bench-x").mkdir()
    for version in ("1", "1", "2"):
        group = f"[dependency-groups]\nrival-x = ['x=={version}']\n"
        (tmp_path / "pyproject.toml").write_text(group)
        assert _rival.environment("x") == tmp_path / ".venv-bench-x"
    assert runs == ["venv", "pip"] * 2


def test_a_request_is_a_post_if_it_has_a_body() -> None:
    """The rivals take POSTs only."""
    get, post = _http.request_for("/x", None), _http.request_for("/x", "{}")
    assert get == b"GET /x HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    assert post.startswith(b"POST /x HTTP/1.1\r\nhost: 127.0.0.1\r\n")
    assert post.endswith(b"\r\ncontent-length: 2\r\n\r\n{}")


# -- every arm ---------------------------------------------------------------------------------


def _round(each: Figure) -> Round:
    measured: dict[str, Sample] = {}
    for step in each.steps:
        try:
            measured.update(step(TINY))
        except Unavailable as error:
            measured.update({arm: {} for arm in error.arms})
    return measured


def _different(figures: list[Figure]) -> list[Figure]:
    """Those that differ when there is a no-op in the place of every model."""
    kinds: dict[object, Figure] = {}
    for each in sorted(figures, key=lambda figure: len(figure.comparisons)):
        kinds[each.name if len(each.steps) == 1 else frozenset(each.arms)] = each
    return list(kinds.values())


def _once(measure: Callable[..., Sample]) -> Callable[..., Sample]:
    """``serve`` or ``script``, which starts the same programs once, for all that need them."""
    lock = threading.Lock()
    samples: dict[object, Future[Sample]] = {}

    def once(what: Load | str, scale: Scale, *arguments: str, **options: bool) -> Sample:
        # With a no-op in the place of every model, its name makes no difference.
        load = (what.connections, what.probed) if isinstance(what, Load) else None
        key = (load, scale, arguments, *options.items())
        with lock:
            first = key not in samples
            sample = samples.setdefault(key, Future())
        if first:
            try:
                sample.set_result(measure(what, scale, *arguments, **options))
            except BaseException as error:
                sample.set_exception(error)
        return sample.result()

    return once


@on_linux
@pytest.mark.parametrize(
    "names", [["handoff-asyncio", "watch"], pytest.param([], marks=pytest.mark.soak, id="all")]
)
def test_every_arm_of_every_figure_yields_finite_figures(
    monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """Each runs once, in its own processes, and fills every column that it is to fill."""
    for measure in (serve, script):
        once = _once(measure)
        for module in (_served, digits, full_cpu, isolation, rivals, web):
            if hasattr(module, measure.__name__):
                monkeypatch.setattr(module, measure.__name__, once)
    figures = [each for each in _different(FIGURES) if each.name in names or not names]
    assert len(figures) >= len(names)
    with ThreadPoolExecutor(3) as executor:
        for each, measured in zip(figures, executor.map(_round, figures), strict=True):
            assert list(measured) == list(each.arms)
            for arm, sample in measured.items():
                assert all(map(math.isfinite, sample.values())), (each.name, arm)
            for metric in each.metrics if any(measured.values()) else ():
                assert any(metric.key in sample for sample in measured.values()), metric
            for comparison in each.comparisons:
                value = comparison.value(measured)
                assert value is None or value >= 0, (each.name, comparison)


def test_the_names_of_figures_are_different() -> None:
    """Each has a file of its own in the results."""
    assert len({each.name for each in FIGURES}) == len(FIGURES)


def test_figures_compare_what_they_measure() -> None:
    """Every comparison is of arms and of a metric that its figure has."""
    for each in FIGURES:
        for comparison in each.comparisons:
            assert {comparison.arm, comparison.against or comparison.arm} <= {*each.arms}
            assert each.label(comparison.metric)


@on_linux
@pytest.mark.parametrize("how", ["main", "submit", "run"])
def test_a_loop_without_a_server_uses_the_real_model(how: str) -> None:
    """Arrays of 32 MiB are made on the runner and on the main thread, without any PyTorch."""
    scale = replace(TINY, iterations=2)
    sample = script("temporaries", scale, "--how", how, "--retain-memory")
    assert sample["calls"] > 0


@on_linux
@pytest.mark.soak
def test_the_digits_are_classified_behind_the_runner() -> None:
    """The real model, trained small, is loaded by the server and answers the load client."""
    scale = replace(TINY, iterations=2, seconds=1.0, warmup=0.1)
    sample = serve(Load(connections=2, model="digits"), scale, "runner")
    assert sample["calls"] > 0
    assert 0 < sample["health_p99"] < math.inf
