"""Feature pages: what they say is right, a model's text stays text, they are whole or absent, and what is missing is named."""

import json
import re
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from conftest import RESIDUAL
from feature_run import DEAD, HOSTILE, RARE, make_run, use_run
from safetensors.torch import load_file

from saelib import autointerp, corpus, dictionaries, feature_pages, files, fragments, models, paths, store

N = 70


@pytest.fixture(scope="module")
def made(llama, rows, harvested, tmp_path_factory):
    """A run folder, and the page that `make` wrote there."""
    folder = tmp_path_factory.mktemp("pages")
    make_run(folder, llama, rows, harvested, n_features=N)
    with pytest.MonkeyPatch.context() as patch:
        use_run(folder, patch)
        return folder, feature_pages.make("made")


@pytest.fixture
def in_run(made, monkeypatch):
    use_run(made[0], monkeypatch)
    return made


@cache
def content(page, name):
    """The arguments that a data script hands over: JSON between the brackets of one call."""
    (found,) = re.fullmatch(r"saelib\.\w+\((.*)\);\n", (page / "data" / f"{name}.js").read_text(), re.S).groups()
    return json.loads(f"[{found}]")


def whole(page, feature):
    first, part = content(page, f"features-{feature // 64:03d}")
    return part[feature - first]


def test_the_folder_is_self_contained(made):
    names = {str(path.relative_to(made[1])) for path in made[1].rglob("*") if path.is_file()}
    data = {"summary", "text", "features-000", "features-001"}
    assert names == {"index.html", "app.js", "style.css", "about.json"} | {f"data/{name}.js" for name in data}
    for name in ("index.html", "app.js", "style.css"):
        assert "//" not in (made[1] / name).read_text().replace("// ", "").replace('"//', ""), (
            f"{name} names an address"
        )


def test_the_package_holds_the_page(made):
    import tomllib

    package_data = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    matched = {path.name for pattern in package_data["saelib"] for path in (paths.ROOT / "saelib").glob(pattern)}
    assert matched == {path.name for path in feature_pages.ASSETS.iterdir()} == {"index.html", "app.js", "style.css"}


def test_statistics_are_those_of_the_codes(made):
    folder, page = made
    run = folder / "runs" / "made"
    (path,) = (run / "dictionaries" / RESIDUAL).glob("*.safetensors")
    held = store.ActivationStore(run / "activations" / RESIDUAL, "held_out")
    with torch.inference_mode():
        code = dictionaries.load(path)[0].encode(held.rows(torch.arange(held.n)).float())
    about, summary = content(page, "summary")
    assert about["n_features"] == len(summary) == N and about["tokens"] == held.n
    for feature, line in enumerate(summary):
        active = code[:, feature][code[:, feature] > 0]
        assert line["n"] == len(active) == np.sum(whole(page, feature)["bins"])
        assert line["frequency"] == pytest.approx(len(active) / held.n, rel=6e-3)
        if len(active):
            assert [line["max"], line["mean"]] == pytest.approx([active.max().item(), active.mean().item()], rel=6e-3)


def test_a_dead_feature_has_effects_and_neighbours_and_nothing_else(made):
    dead = whole(made[1], DEAD)
    assert dead["n"] == dead["max"] == 0 and dead["purity"] is None and dead["explanation"] is None
    assert dead["bins"] == [] and dead["contexts"] == {} and len(dead["promoted"]) == 10 and len(dead["nearest"]) == 6


def test_explained_where_twenty_fragments_are_active(made):
    assert whole(made[1], RARE)["n"] > 0 and whole(made[1], RARE)["explanation"] is None
    told = [whole(made[1], feature) for feature in range(N) if whole(made[1], feature)["explanation"]]
    assert len(told) > N / 2 and all(-1 <= one["scores"]["both"] <= 1 for one in told)


def test_the_first_block_is_explained_and_scored_as_in_notebook_04(in_run):
    """Its lines: fragments of the held-out rows, codes of the first features, records, token rules, scores."""
    run = in_run[0] / "runs" / "made"
    held = store.ActivationStore(run / "activations" / RESIDUAL, "held_out")
    head = files.read_json(run / "activations" / "tokens.json")
    rows = corpus.TokenRows(**load_file(run / "activations" / "tokens.safetensors"), **head)
    tokenizer = models.load_tokenizer(str(in_run[0] / "model"))
    separator = tokenizer.convert_tokens_to_ids(head["spec"]["separator"])
    pieces = fragments.cut(rows.held_out, held, seed=0, length=5, separator=separator)
    (path,) = (run / "dictionaries" / RESIDUAL).glob("*.safetensors")
    chosen = torch.arange(50)
    code = fragments.codes(dictionaries.load(path)[0], held, pieces, chosen)
    found, _ = fragments.records(pieces, code, chosen, generator=torch.Generator().manual_seed(0))
    rules = autointerp.TokenRules(length=8)
    scores = {row["feature"]: row for row in autointerp.score_all(found, rules, rules)[0]}
    for feature in range(50):
        row, shown = scores.get(feature, {}), whole(in_run[1], feature)["scores"]
        assert shown == {name: pytest.approx(row[name], rel=6e-3) for name in autointerp.PARTS if name in row}
    assert len(scores) > 25


def test_a_feature_with_known_codes():
    code = np.zeros((2, 40), dtype=np.float32)
    tokens = np.full((2, 40), 9)
    tokens[0, [5, 25]], tokens[1, 8] = 1, 2
    code[0, 5], code[0, 25], code[1, 8], code[1, 9], code[1, 0] = 10.0, 6.0, 5.5, 1.0, np.nan
    one = feature_pages.describe(code, tokens, str, np.random.default_rng(0))
    assert [one["n"], one["max"], one["mean"], one["frequency"]] == [4, 10.0, 5.62, round(4 / 79, 4)]
    assert one["purity"] == round(2 / 3, 3) and one["fires"] == ["1", "2", "9"] and one["legend"] == ["1", "2", "9"]
    assert one["bins"][9] == [1, 0, 0, 0] and one["bins"][6] == [1, 0, 0, 0] and one["bins"][5] == [0, 1, 0, 0]
    assert one["contexts"]["top"] == [
        [0, 0, 16, 5, [5, 10.0]], [0, 1, 36, 25, [4, 10.0, 24, 6.0]], [1, 0, 19, 8, [0, -1.0, 8, 5.5, 9, 1.0]]
    ]  # fmt: skip
    assert one["contexts"]["low"] == []  # its only one stands beside a context of the first group


def test_contexts_point_into_the_text(made):
    names, rows, documents = content(made[1], "text")
    for feature in (0, 1, 69):
        one = whole(made[1], feature)
        row, start, stop, position, levels = one["contexts"]["top"][0]
        pairs = dict(zip(levels[::2], levels[1::2], strict=True))
        assert pairs[position - start] == one["max"] and start + max(pairs) < stop <= len(rows[row])
        assert names[rows[row][position]] in "".join(one["fires"] + one["legend"]) or one["n"] > 5
        assert documents[row][0][0] == 0 and documents[row][0][1].startswith("<i>made</i>")


def test_logit_effects_are_the_norm_and_unembedding_of_the_direction(llama):
    bridge = models.load_model(llama)
    directions = dictionaries.unit_rows(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)))
    values, ids = feature_pages.logit_effects(bridge, RESIDUAL, directions, n=4)
    network = bridge.original_model
    with torch.inference_mode():
        u = directions * 32**0.5
        expected = network.lm_head(network.model.norm(u))
        expected = expected - expected.mean(-1, keepdim=True)
    torch.testing.assert_close(values, expected.gather(1, ids), rtol=1e-3, atol=1e-4)
    assert torch.equal(ids[:, 0], expected.argmax(1)) and torch.equal(ids[:, -1], expected.argmin(1))


def test_logit_effects_of_a_hidden_layer_go_through_its_output_matrix(neox):
    bridge = models.load_model(neox)
    directions = dictionaries.unit_rows(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
    values, ids = feature_pages.logit_effects(bridge, "blocks.0.mlp.hook_post", directions, n=4)
    network = bridge.original_model
    with torch.inference_mode():
        written = (
            directions @ network.gpt_neox.layers[0].mlp.dense_4h_to_h.weight.T
        )  # its bias is no part of the feature
        u = written / written.square().mean(1, keepdim=True).sqrt()
        norm = network.gpt_neox.final_layer_norm
        expected = (norm(u) - norm.bias) @ network.lm_head.weight.T
        expected = expected - expected.mean(1, keepdim=True)
    torch.testing.assert_close(values, expected.gather(1, ids), rtol=1e-3, atol=1e-4)


def test_logit_effects_are_the_same_in_the_papers_coordinates(neox):
    directions = dictionaries.unit_rows(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))
    raw, processed = (models.load_model(neox, compatibility=flag) for flag in (False, True))
    values, ids = feature_pages.logit_effects(raw, RESIDUAL, directions, n=4)
    again, same = feature_pages.logit_effects(processed, RESIDUAL, directions, n=4)
    torch.testing.assert_close(again, values, rtol=1e-3, atol=1e-3)
    assert torch.equal(same, ids)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_escaped_and_comes_back_as_it_was(hostile):
    line = feature_pages.script("text", [hostile], {"a": hostile})
    assert line.isascii() and not set("<>&") & set(line)
    assert json.loads(re.fullmatch(r"saelib\.text\((\[.*?\]),(\{.*\})\);\n", line)[2]) == {"a": hostile}


def test_no_markup_of_the_text_reaches_a_script(made):
    for path in (made[1] / "data").iterdir():
        assert path.read_text().isascii() and not set("<>&") & set(path.read_text())
    assert set(HOSTILE) <= set(content(made[1], "text")[0])


def test_the_page_sets_text_as_text():
    code = (feature_pages.ASSETS / "app.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", code)


def test_a_second_call_does_nothing_and_a_changed_input_makes_the_page_anew(in_run, monkeypatch):
    page = in_run[1]
    before = (page / "about.json").stat().st_mtime_ns
    assert feature_pages.make("made") == page and (page / "about.json").stat().st_mtime_ns == before
    feature_pages.profiles.load("made")["04_autointerp"]["rule_length"] = 2
    monkeypatch.setattr(
        feature_pages, "features", lambda *_, **options: pytest.fail(f"made anew, {options['rule_length']}")
    )
    with pytest.raises(pytest.fail.Exception, match="made anew, 2"):
        feature_pages.make("made")
    assert (page / "about.json").stat().st_mtime_ns == before, "the old page stays until the new one is whole"


def test_what_is_missing_is_named_with_the_notebook_that_makes_it(in_run, tmp_path, monkeypatch, capsys):
    with pytest.raises(feature_pages.PageError, match=r"no dictionary 'none' in .*; there are tied"):
        feature_pages.make("made", None, "none")
    with pytest.raises(paths.MissingArtefact, match="Notebook 01_collect_activations makes it"):
        feature_pages.make("made", "blocks.2.hook_resid_post")
    shutil.copytree(in_run[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "runs" / "made" / "dictionaries")
    monkeypatch.setattr(paths, "DATA", tmp_path / "copy")
    with pytest.raises(paths.MissingArtefact, match="Notebook 02_train_dictionaries makes them"):
        feature_pages.make("made")
    with pytest.raises(SystemExit, match=r"error: .*Notebook 02_train_dictionaries"):
        feature_pages.main(["made", "--dictionary", "tied"])


def test_the_command_prints_path_and_size(in_run, capsys):
    feature_pages.main(["made"])
    assert re.fullmatch(r".*index\.html \(\d+\.\d MB\): open it in a browser\n", capsys.readouterr().out)
