"""Drawn attention maps: a panel a head, the axes named, the numbers those of the maps."""

from __future__ import annotations

import sys

import pytest
import torch

from pyarch.maps import AttentionMaps

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from matplotlib.figure import Figure  # noqa: E402

OPERATOR = "attention"


def maps(heads=4, queries=9, keys=11):
    weights = torch.rand(2, heads, queries, keys).softmax(-1)
    return AttentionMaps({"layers.0": weights, "layers.1": weights.flip(1)})


def panels(figure):
    return [each for each in figure.axes if each.images]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16])
def test_maps_plot_draws_a_panel_a_head(heads):
    given = maps(heads)
    figures = given.plot()
    assert len(figures) == 2 and all(isinstance(each, Figure) for each in figures)
    drawn = panels(figures[0])
    assert [each.get_title() for each in drawn] == [f"head {number}" for number in range(heads)]
    for number, panel in enumerate(drawn):
        assert torch.equal(torch.tensor(panel.images[0].get_array()), given["layers.0"][0, number])
    assert figures[0].get_suptitle() == "layers.0, sample 0"


def test_maps_plot_names_the_axes_once_a_row_and_column():
    figure = maps(5).plot("layers.0")[0]
    figure.canvas.draw()
    drawn = panels(figure)
    assert [each.get_ylabel() for each in drawn] == ["query", "", "", "query", ""]
    assert [each.get_xlabel() for each in drawn] == ["", "", "key", "key", "key"]
    assert drawn[2].xaxis.get_tick_params()["labelbottom"]
    (bar,) = (each for each in figure.axes if each.get_label() == "<colorbar>")
    assert bar.get_ylabel().startswith("attention weight")


def test_maps_plot_has_one_colour_scale_from_zero():
    given = maps()
    scales = {panel.images[0].get_clim() for panel in panels(given.plot("layers.0", sample=1)[0])}
    assert scales == {(0.0, float(given["layers.0"][1].max()))}


def test_maps_plot_of_one_head_and_sample():
    given = maps()
    (figure,) = given.plot("layers.1", head=2, sample=1)
    (panel,) = panels(figure)
    assert panel.get_title() == "head 2" and figure.get_suptitle() == "layers.1, sample 1"
    assert torch.equal(torch.tensor(panel.images[0].get_array()), given["layers.1"][1, 2])


def test_maps_plot_of_means():
    given = AttentionMaps({"": torch.rand(2, 9, 11)})
    (figure,) = given.plot()
    assert [each.get_title() for each in panels(figure)] == ["mean of heads"]
    assert figure.get_suptitle() == "the model, sample 0"
    with pytest.raises(ValueError, match="head 0 of '', whose maps are the mean"):
        given.plot(head=0)


def test_maps_plot_of_many_keys_shows_the_largest_of_a_neighbourhood():
    weights = torch.zeros(1, 1, 4, 3000)
    weights[0, 0, 1, 1234] = 0.7
    (panel,) = panels(AttentionMaps({"long": weights}).plot()[0])
    dots = panel.images[0].get_array()
    assert dots.shape == (4, 300) and dots[1].max() == pytest.approx(0.7) and dots[0].max() == 0
    assert panel.images[0].get_extent() == [-0.5, 2999.5, 3.5, -0.5]


def test_maps_plot_of_nothing_but_zeros():
    """Queries that see no key; also no query at all is drawn."""
    (figure,) = AttentionMaps({"blind": torch.zeros(1, 2, 3, 4)}).plot()
    figure.canvas.draw()
    assert len(panels(figure)) == 2


def test_maps_plot_says_what_there_is_not():
    given = maps()
    with pytest.raises(KeyError, match="no map of 'nine'; there are 'layers.0', 'layers.1'"):
        given.plot("nine")
    with pytest.raises(IndexError, match="sample 2 of 'layers.0', whose batch is 2"):
        given.plot(sample=2)
    with pytest.raises(IndexError, match="head 4 of 'layers.0', which has 4"):
        given.plot(head=4)


@pytest.mark.parametrize("ending, start", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_maps_save_one_file_a_layer(tmp_path, ending, start):
    paths = maps(1).save(tmp_path / f"maps{ending}")
    assert [each.name for each in paths] == [f"maps-layers.0{ending}", f"maps-layers.1{ending}"]
    assert all(each.read_bytes().startswith(start) for each in paths)
    assert maps(1).save(tmp_path / f"one{ending}", "layers.1") == [tmp_path / f"one{ending}"]


def test_maps_save_refuses_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="(?i)format 'maps' is not supported"):
        maps().save(tmp_path / "one.maps", "layers.1")


def test_maps_are_not_drawn_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "pyarch.maps_picture", raising=False)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'pyarch-kernels\[plots\]'"):
        maps().plot()
