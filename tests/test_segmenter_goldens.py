"""The U-Net and its loss against the values of the authors' code (shared/goldens/unet_small, unet_loss).

Tolerances: logits 1e-4, losses 1e-6, gradients 1e-7, as the goldens' descriptions suggest.
"""
import pytest
import torch
from safetensors.torch import load_file

from synthmr.segmenters.unet import UNet, head_weights, one_hot, segmentation_loss, soft_dice

# official name -> ours, {l} counted from full resolution; theirs counts the way up from the deepest
BLOCK = {0: 0, 2: 2, 3: 3, 5: 5} # position in a block: convolution, norm, convolution, norm

def our_names(levels: int) -> dict[str, str]:
    "Prefix of the official name -> ours."
    up = {levels - 2 - i: i for i in range(levels - 1)} # our level -> their number on the way up
    names = {f'down_path.{l}.block.{i}.': f'down.{l}.{j}.' for l in range(levels) for i, j in BLOCK.items()}
    for l, i in up.items():
        names[f'up_path.{i}.up.1.'] = f'narrow.{l}.'
        names |= {f'up_path.{i}.conv_block.block.{k}.': f'up.{l}.{j}.' for k, j in BLOCK.items()}
        names[f'output_layers.{i}.' + ('' if l == 0 else '0.')] = f'heads.{l}.'     # the highest is not followed by an enlargement
    return names

def official_weights(golden: dict, padding: str, levels: int=4) -> dict[str, torch.Tensor]:
    "The golden's weights under our names."
    prefix, names = f'{padding}.U.', our_names(levels)
    def ours(key):
        start, kind = key.rsplit('.', 1)
        return names[start + '.'] + kind
    return {ours(k.removeprefix(prefix)): v for k, v in golden.items() if k.startswith(prefix)}

def test_the_table_of_names_is_one_to_one():
    names = our_names(6)
    assert len(set(names.values())) == len(names)
    with torch.device('meta'): net = UNet()
    assert {k.rsplit('.', 1)[0] + '.' for k in net.state_dict()} == set(names.values())

@pytest.mark.parametrize('padding', ['same', 'valid'])
def test_unet(shared, padding):
    golden = load_file(shared/'goldens'/'unet_small.safetensors')
    net = UNet(levels=4, filters=8, padding=padding)
    net.load_state_dict(official_weights(golden, padding))
    heads = net.train()(golden[f'{padding}.in.x'])
    assert len(heads) == 3
    for i, head in enumerate(heads):
        torch.testing.assert_close(head, golden[f'{padding}.out.{i}'], atol=1e-4, rtol=0)
    torch.testing.assert_close(net.eval()(golden[f'{padding}.in.x']), golden[f'{padding}.out.0'], atol=1e-4, rtol=0)

def test_a_wrong_order_is_seen(shared):
    "The comparison can fail: the heads in another order, the norm before the ReLU."
    golden = load_file(shared/'goldens'/'unet_small.safetensors')
    net = UNet(levels=4, filters=8)
    net.load_state_dict(official_weights(golden, 'same'))
    heads = net(golden['same.in.x'])
    assert (heads[0] - golden['same.out.1']).abs().max() > 0.1
    for module in net.modules():
        if isinstance(module, torch.nn.LeakyReLU): module.negative_slope = 0.02
    assert (net(golden['same.in.x'])[0] - heads[0]).abs().max() > 1e-2

@pytest.mark.parametrize('case', ['plain', 'ignore'])
def test_loss(shared, case):
    golden = load_file(shared/'goldens'/'unet_loss.safetensors')
    heads = [golden[f'in.output{i}'].requires_grad_() for i in range(5)]
    annotation = golden['in.target' if case == 'plain' else 'in.target_ignore']
    weights = head_weights(5, normalise=True, drop_deepest=True)
    torch.testing.assert_close(torch.tensor(weights), golden[f'out.{case}.weights'], atol=1e-7, rtol=0)

    loss, _ = segmentation_loss(heads, annotation, weights)
    torch.testing.assert_close(loss, golden[f'out.{case}.total'], atol=1e-6, rtol=0)
    loss.backward()
    for i in (0, 3): torch.testing.assert_close(heads[i].grad, golden[f'out.{case}.grad_level{i}'], atol=1e-7, rtol=0)
    assert golden[f'out.{case}.grad_level4_is_none_or_zero'] == 1 and heads[4].grad is None

    truth = one_hot(annotation)
    for head, dice, entropy in zip(heads, golden[f'out.{case}.dice_per_level'], golden[f'out.{case}.ce_per_level']):
        torch.testing.assert_close(-soft_dice(head, truth).mean(), dice, atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.nn.functional.cross_entropy(head, annotation, ignore_index=255), entropy, atol=1e-6, rtol=0)
