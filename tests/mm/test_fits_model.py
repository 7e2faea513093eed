"""Classes of data sets, in whatever wrappers, against those of their annotations and of the model's heads."""

from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from mmengine.dataset import BaseDataset, RepeatDataset  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import ConcatDataset, Subset  # noqa: E402

from ssm_mm.fits_model import FitsModel, plain_datasets  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402


class Digits(BaseDataset):
    def __init__(self, classes=("one", "two"), images=2, **kwargs):
        self.images = images
        super().__init__(data_root="digits", metainfo={"classes": classes}, serialize_data=False, **kwargs)

    def load_data_list(self):
        return [{"img_path": f"{i}.png", "instances": []} for i in range(self.images)]


def check(dataset, classes=2):
    model = nn.Module()
    model.head = nn.Linear(2, 2)
    model.head.num_classes = classes
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
    FitsModel().before_test(SimpleNamespace(model=model, test_loop=loop))


def wrap(inner):
    """Two data sets in wrappers of several depths, the second is `inner`."""
    return Subset(ConcatDataset([Digits(), RepeatDataset(inner, times=2)]), [0])


def test_plain_datasets():
    first, second = Digits(), Digits()
    assert plain_datasets(first) == [first]
    assert plain_datasets(Subset(ConcatDataset([first, RepeatDataset(second, times=2)]), [0])) == [first, second]


@pytest.mark.parametrize("wrapper", [lambda dataset: dataset, wrap])
def test_what_fits_and_what_does_not(wrapper):
    check(wrapper(Digits(test_mode=True)))
    with pytest.raises(UserError, match="head.num_classes is 3, but the data has 2 classes"):
        check(wrapper(Digits()), classes=3)
    with pytest.raises(UserError, match=r"the data set in digits is empty: .* of the classes \('one', 'two'\)"):
        check(wrapper(Digits(images=0)))


def test_categories_of_an_inner_data_set():
    inner = Digits()
    inner.cat_ids, inner.cat2label, inner.ann_file = [7], {7: "one"}, "some.json"
    with pytest.raises(UserError, match="some.json has 1 of the 2 classes of the config"):
        check(wrap(inner))
