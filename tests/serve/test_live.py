"""The live report over a real socket: what it shows, when it draws anew, and whom it does not answer."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from stackllama.errors import RunError
from stackllama.serve.live import LivePage, LiveServer


def write_run(folder: Path, loss: float = 2.5) -> Path:
    (folder / "sft").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("name: try\n", "utf-8")
    (folder / "sft/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n", "utf-8")
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    with LiveServer(LivePage(write_run(tmp_path / "try"), defaults=None, every=7), 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(
    server: LiveServer, path: str = "/", *, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers=dict(headers or {}))
    answer = connection.getresponse()
    text = answer.read().decode("utf-8")
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def test_the_report_is_shown_and_asks_to_be_asked_again(server: LiveServer) -> None:
    status, headers, text = ask(server)
    assert (status, headers["Refresh"]) == (200, "7")
    assert "<h1>try</h1>" in text
    assert "Loss" in text
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert headers["Cache-Control"] == "no-store"
    assert int(headers["Content-Length"]) == len(text.encode())
    status, headers, text = ask(server, method="HEAD")
    assert (status, text) == (200, "")


def test_it_is_drawn_anew_only_where_a_file_has_changed(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = LivePage._draw

    def draw(page: LivePage) -> bytes:
        drawn.append(1)
        return real(page)

    monkeypatch.setattr(LivePage, "_draw", draw)
    first, second = ask(server)[2], ask(server)[2]
    assert first == second
    assert len(drawn) == 1
    with (server.live.folder / "sft/metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"step": 10, "loss": 1.5}) + "\n")
    assert ask(server)[2] != first
    assert len(drawn) == 2


def test_a_run_without_results_is_waited_for_and_its_names_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>new"
    folder.mkdir()
    page = LivePage(folder, defaults=None, every=20)
    assert "run a stage in it first" in page.page().decode()
    assert "<b>new" not in page.page().decode()
    write_run(folder)
    assert "Loss" in page.page().decode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:{port}"}, 421),
        ({"Host": "127.0.0.1"}, 421),  # without the port it is another server's name
        ({"Host": ""}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:{port}"}, 200),
        ({"Origin": "http://localhost:{port}"}, 200),
    ],
)
def test_only_its_own_names_are_answered(server: LiveServer, headers: dict[str, str], status: int) -> None:
    given = {name: value.format(port=server.server_port) for name, value in headers.items()}
    found, _, text = ask(server, headers=given)
    assert found == status
    assert ("Loss" in text) == (status == 200)


def test_there_is_one_page_and_nothing_can_be_sent(server: LiveServer) -> None:
    assert ask(server, "/../recipe.yaml")[0] == 404
    assert ask(server, "/sft/metrics.jsonl")[0] == 404
    assert ask(server, method="POST")[0] == 501


def test_it_listens_on_the_loopback_address_and_a_taken_port_is_an_error(server: LiveServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(RunError, match=r"port \d+ of 127\.0\.0\.1 cannot be listened on: .*give another --port"):
        LiveServer(server.live, server.server_port)
    with pytest.raises(RunError, match="port 70000"):
        LiveServer(server.live, 70000)
