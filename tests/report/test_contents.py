"""What a report reads off a recording; the terminal view and the figures made of it."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from recordings import HOSTILE, picture_recording, text_recording
from rich.console import Console

from mixhead import MixheadError, Recording, record_routing
from mixhead.data.token_text import readable
from mixhead.report.contents import read_contents
from mixhead.report.parts_of_speech import parts_of_speech
from mixhead.report.plots import health_plot, last_that_chooses, plot_load_by, plot_loads
from mixhead.report.statistics import Load
from mixhead.report.terminal import load_map, terminal_view
from mixhead.report.word_classes import word_class
from mixhead.report.words import joined_words, word_numbers


def test_loads_groups_and_texts(tmp_path):
    recording = text_recording(tmp_path / "run")
    contents = read_contents(recording)
    first = recording.layers[0]
    assert contents.loads[first].share_H.tolist() == recording.selected(first).mean(0).tolist()
    assert contents.axes[0].texts[: len(HOSTILE)] == HOSTILE
    assert [s.title for s in contents.axes[0].sequences] == ["Text 1 (text <0>)", "Text 2 (text <1>)"]
    by_text = contents.groups_by("text")
    assert [group.value for group in by_text] == ["text <0>", "text <1>"]
    assert by_text[0].loads[first].share_H.tolist() == recording.selected(first)[:40].mean(0).tolist()
    assert {"word class", "position"} <= {group.label for group in contents.groups}
    assert not contents.gates_vary
    assert read_contents(text_recording(tmp_path / "weighted", weighted=True)).gates_vary


def test_only_so_many_tokens_are_shown_but_all_count(tmp_path):
    contents = read_contents(text_recording(tmp_path / "run", texts=3), most_tokens=50)
    assert len(contents.axes[0].texts) == len(contents.axes[0].codes_TX) == 50
    assert [s.count for s in contents.axes[0].sequences] == [40, 10]
    assert next(iter(contents.loads.values())).tokens == 120
    assert contents.notes == ["50 of 120 tokens are shown; all of them count in the figures."]


def test_pictures_have_grids_and_times(tmp_path):
    contents = read_contents(picture_recording(tmp_path / "run", steps=(5, 1)))
    assert [axis.kind for axis in contents.axes] == ["image", "image"]
    assert [(s.picture, s.time, s.grid) for s in contents.axes[1].sequences] == [
        (0, 5, (2, 3)), (1, 5, (2, 3)), (0, 1, (2, 3)), (1, 1, (2, 3)),
    ]  # fmt: skip
    assert {group.label for group in contents.groups} == {"class", "time_step"}


def test_an_empty_recording_is_refused(tmp_path):
    import torch

    with record_routing(torch.nn.Linear(1, 1), tmp_path / "run"):
        pass
    with pytest.raises(MixheadError, match="routes in no layer"):
        read_contents(Recording(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["texts", "pictures", "one token", "no token"])
def test_the_terminal_shows_it(tmp_path, kind):
    path = tmp_path / "run"
    made = {
        "texts": lambda: text_recording(path),
        "pictures": lambda: picture_recording(path),
        "one token": lambda: text_recording(path, texts=1, tokens=1),
        "no token": lambda: text_recording(path, texts=1, tokens=0),
    }[kind]()
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal_view(read_contents(made)))
    text = console.export_text()
    assert "Load of every head" in text
    if kind == "texts":
        assert "<script>document.title='taken'</script>" in text.replace("\n", "")
        assert "\t" not in text


def test_long_names_of_layers_are_listed_above_the_map():
    def load_map_of(*layers):
        loads = dict.fromkeys(layers, Load(np.ones(1), np.zeros(1), 1))
        contents = SimpleNamespace(recording=SimpleNamespace(layers=layers), loads=loads)
        return load_map(contents, list(layers)).plain.splitlines()[1:]

    assert load_map_of("0", "1") == [" head  0 1", "    0  █ █"]
    assert load_map_of("encoder.0", "decoder.0") == ["layers: 0 encoder.0, 1 decoder.0", " head  0 1", "    0  █ █"]


def test_figures_for_papers(tmp_path):
    contents = read_contents(text_recording(tmp_path / "run"))
    for name in ("text.png", "text.svg"):
        plot_load_by(contents, "text", tmp_path / name)
    assert "<!-- head of layer 2 -->" in (tmp_path / "text.svg").read_text()
    plot_loads(contents, tmp_path / "map.png")
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "text.svg").read_text()
    with pytest.raises(MixheadError, match="not grouped by 'class'; they are by text, word class, position"):
        plot_load_by(contents, "class", tmp_path / "x.png")
    with pytest.raises(MixheadError, match="is written as"):
        plot_loads(contents, tmp_path / "x.bmp")
    plot_load_by(read_contents(picture_recording(tmp_path / "images")), "class", tmp_path / "class.png")
    drawn = read_contents(picture_recording(tmp_path / "drawn", steps=range(999, 0, -100)))
    plot_load_by(drawn, "time_step", tmp_path / "time.svg", most=3)


def test_the_figure_is_of_the_last_layer_that_chooses(tmp_path):
    contents = read_contents(text_recording(tmp_path / "run"))
    *_, before, last = contents.recording.layers
    assert last_that_chooses(contents) == last
    whole = replace(contents.loads[last], share_H=np.ones(4))
    assert last_that_chooses(replace(contents, loads={**contents.loads, last: whole})) == before


def test_a_picture_of_a_run_and_none_of_a_dense_one(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text(
        "step,loss,balance,smallest_load,largest_load,load_entropy\n1,2,3,0.2,0.9,0.8\n2,1.5,2.9,0.3,0.8,0.9\n"
    )
    assert health_plot(log, tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")
    columns = [f"load_entropy_{layer}" for layer in (3, 7, 11)]
    log.write_text(f"step,balance,{','.join(columns)}\n1,3,0.1,0.5,0.9\n2,2,0.2,0.6,0.9\n")
    assert health_plot(log, tmp_path / "layers.svg")
    drawn = (tmp_path / "layers.svg").read_text()
    assert all(f"<!-- {layer} -->" in drawn for layer in (3, 7, 11))
    log.write_text("step,loss,balance\n1,2,\n2,1.5,\n")
    assert not health_plot(log, tmp_path / "dense.png")
    assert not (tmp_path / "dense.png").exists()
    assert not health_plot(tmp_path / "none.csv", tmp_path / "none.png")


def test_characters_over_several_tokens_are_whole_again():
    bytes_of = [bytes([b]).decode("utf-8", "surrogateescape") for b in " 😀".encode()]
    assert readable(["a", *bytes_of, "b"]) == ["a", " ", "😀", "", "", "", "b"]
    assert readable(bytes_of[1:3]) == ["�", ""]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("the these", "determiner"),
        ("they whose", "pronoun"),
        ("of without", "preposition"),
        ("and because", "conjunction"),
        ("was should", "auxiliary"),
        ("1812 3rd", "number"),
        (", -- $ «", "punctuation"),
        ("Washington", "capitalised"),
        ("treaty 😀 مرحبا", "other word"),
    ],
)
def test_word_classes(texts, expected):
    assert {word_class(f" {text}") for text in texts.split()} == {expected}


def test_pieces_that_are_no_words():
    assert [word_class(text) for text in ("ing", "\n", "", " ")] == ["continuation", "space", "space", "space"]


def test_words_are_put_together_from_their_pieces():
    texts = ["The", " lib", "er", "ality", "?", " It", "'s", " caf", "\u00e9", "", "s", ",", "\n", "3", " x"]
    numbers = word_numbers(texts, [place == 14 for place in range(15)])
    assert joined_words(texts, numbers) == ["The", "liberality", "?", "It's", "cafés", ",", "", "3", "x"]
    assert word_numbers([], []) == []
    assert word_numbers(["a", "b"], [True, True]) == [0, 1]


def test_parts_of_speech_of_english_and_of_nothing_else():
    pytest.importorskip("textblob", reason="TextBlob is not installed")
    expected = {
        "The": "determiner", "nations": "noun", "of": "preposition", "the": "determiner", "world": "noun",
        "must": "auxiliary", "quickly": "adverb", "refuse": "verb", "12": "number", "wars": "noun", ",": "punctuation",
        "and": "conjunction", "we": "pronoun", "will": "auxiliary", "see": "verb", "them": "pronoun",
        ".": "punctuation", "They": "pronoun", "run": "verb", "<script>": "noun",
    }  # fmt: skip
    assert dict(zip(expected, parts_of_speech([*expected]), strict=True)) == expected
    assert parts_of_speech(["Die", "Völker", "der", "Welt", "sollen", "in", "Frieden", "leben"]) is None
    assert parts_of_speech(["def", "add", "(", "one", ",", "other", ")", ":", "return", "total", "+", "x"]) is None
    assert parts_of_speech([]) is None


def test_agreement_of_layers_is_known_for_each_pair(tmp_path):
    contents = read_contents(text_recording(tmp_path / "run"))
    assert len(contents.agreement) == 3
    assert all(0 <= value <= 1 for value in contents.agreement.values())
    assert np.isfinite([*contents.agreement.values()]).all()
