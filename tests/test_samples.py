"""A sample that cannot be read is named in one line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from repvit_mm.samples import SampleError, check_label_map, explain


class Failing(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise SampleError('a.jpg is empty')


@pytest.mark.parametrize('workers', [0, 1])
def test_message_is_one_line_from_whichever_process(workers):
    with pytest.raises(SampleError) as caught:
        next(iter(DataLoader(Failing(), num_workers=workers)))
    assert str(caught.value) == 'a.jpg is empty'


def test_what_cannot_be_read_is_named(tmp_path):
    image, labels = tmp_path / 'a.png', tmp_path / 'b.png'
    info = dict(img_path=str(image), seg_map_path=str(labels))
    gone = FileNotFoundError(2, 'No such file or directory', str(labels))
    assert str(explain(info, gone)) == f'{labels} cannot be read: No such file or directory'
    image.write_bytes(b'')
    assert str(explain(info, AssertionError())) == f'{image} is empty'
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(image)
    text = str(explain(info, ValueError('the label map\nis no image')))
    assert text == f'{image} with {labels} cannot be prepared: the label map is no image'


def packed(shape: tuple[int, int]) -> dict:
    """A sample of an image of 20x30 that was resized to 40x60, with a label map of some size."""
    sample = SimpleNamespace(
        gt_sem_seg=torch.zeros(shape), metainfo=dict(ori_shape=(20, 30), img_path='a.png', seg_map_path='b.png')
    )
    return dict(inputs=torch.zeros(3, 40, 60), data_samples=sample)


@pytest.mark.parametrize('shape', [(40, 60), (20, 30)])
def test_label_map_may_be_resized_or_as_it_was_read(shape):
    check_label_map(packed(shape))


def test_label_map_of_another_size_is_refused():
    with pytest.raises(SampleError, match=r'label map b.png is of another size than a.png: 60x39 for 60x40 pixels'):
        check_label_map(packed((39, 60)))


@pytest.mark.parametrize('other', [None, dict(inputs=[1], data_samples=None), dict(inputs=torch.zeros(3, 4, 4))])
def test_other_samples_are_left_alone(other):
    check_label_map(other)
