import json

import numpy as np
import pytest
import torch

from mmadvmoe.utils import as_plain, choose


def test_an_allowed_name_comes_back() -> None:
    assert choose('L2', ('Linf', 'L2'), 'norm') == 'L2'


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r'attack\.norm=.* \(did you mean .Linf.\?\); allowed: Linf, L2'):
        choose('Linfty', ('Linf', 'L2'), 'attack.norm')


@pytest.mark.parametrize('name', [None, 3, 'zzz', ''])
def test_what_resembles_nothing_gets_no_hint(name: object) -> None:
    with pytest.raises(ValueError) as raised:
        choose(name, ('Linf', 'L2'), 'norm')
    assert 'did you mean' not in str(raised.value) and 'allowed: Linf, L2' in str(raised.value)


def test_what_json_cannot_hold_is_written_plainly() -> None:
    value = dict(a=torch.eye(2), b=(np.float32(0.5), {np.int64(3)}), c={1: None, 'd': dict}, e=True)
    expected = dict(a=[[1.0, 0.0], [0.0, 1.0]], b=[0.5, [3]], c={'1': None, 'd': 'dict'}, e=True)
    assert json.loads(json.dumps(as_plain(value))) == expected
