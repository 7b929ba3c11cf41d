"""Annotations that changed are noticed, wherever they lie."""

from types import SimpleNamespace

import pytest

from repvit_mm.fingerprint import changed, fingerprints


class LabelMaps:
    """A data set of label maps in a folder."""

    ann_file = ''

    def __init__(self, folder) -> None:
        self.data_prefix = dict(seg_map_path=str(folder))
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def get_data_info(self, index: int) -> dict:
        return dict(seg_map_path=str(self.paths[index]))


@pytest.mark.parametrize('wrapped', [False, True])
def test_annotation_file(tmp_path, wrapped):
    file = tmp_path / 'a.json'
    file.write_text('{"a": 1}')
    dataset = SimpleNamespace(ann_file=str(file))
    if wrapped:
        dataset = SimpleNamespace(dataset=SimpleNamespace(datasets=[dataset]))
    before = fingerprints(dataset)
    assert list(before) == [str(file)] and not changed(before, fingerprints(dataset))
    file.write_text('{"a": 2}')
    assert changed(before, fingerprints(dataset)) == [str(file)]


def test_label_maps(tmp_path):
    folder = tmp_path / 'labels'
    folder.mkdir()
    for name in 'ab':
        (folder / name).write_text(name)
    before = fingerprints(LabelMaps(folder))
    moved = folder.rename(tmp_path / 'moved')
    assert not changed(before, fingerprints(LabelMaps(moved)))
    (moved / 'a').write_text('aa')
    assert changed(before, fingerprints(LabelMaps(moved))) == [str(moved)]
    (moved / 'a').write_text('a')
    (moved / 'c').write_text('c')
    assert changed(before, fingerprints(LabelMaps(moved))) == [str(moved)]


def test_what_has_no_annotations_has_no_fingerprint():
    assert fingerprints(None) == fingerprints([1, 2]) == {}
    assert changed({}, {'a.json': '1'}) == ['a.json']
