//! The fast CPU paths against candle's own operations, over many shapes.

use std::collections::HashMap;

use candle_core::{D, Device, Module, Tensor};
use genvideo::engine::device::Compute;
use genvideo::engine::nn::activation::{geglu, silu, swap_axes};
use genvideo::engine::nn::attention::{Mask, attend};
use genvideo::engine::nn::conv::{Conv2d, Conv2dSpec};
use genvideo::engine::nn::linear::Linear;
use genvideo::engine::nn::norm::GroupNorm;
use genvideo::engine::noise::Stream;
use genvideo::engine::weights::Weights;

fn random(seed: u64, shape: &[usize]) -> Tensor {
    Stream::torch(seed).tensor(shape, &Device::Cpu).unwrap()
}

/// Both within a few last places of the largest value.
fn check_close(got: &Tensor, wanted: &Tensor, about: &str) {
    assert_eq!(got.dims(), wanted.dims(), "{about}");
    let largest = |x: &Tensor| {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
    };
    let (off, scale) = (largest(&(got - wanted).unwrap()), largest(wanted).max(1.0));
    assert!(off <= 2e-5 * scale, "{about}: off by {off} of {scale}");
}

fn weights(tensors: &[(&str, Tensor)]) -> Weights {
    let folder = tempfile::tempdir().unwrap();
    let tensors: HashMap<&str, Tensor> = tensors.iter().cloned().collect();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    Weights::open(folder.path(), &Compute::cpu()).unwrap()
}

#[test]
fn convolutions_agree() {
    for (batch, input, output, size, kernel, stride, padding) in [
        (1, 3, 5, (7, 9), (3, 3), 1, (1, 1)),
        (2, 8, 4, (1, 1), (3, 3), 1, (1, 1)),
        (2, 8, 4, (16, 33), (3, 3), 1, (1, 1)),
        (1, 33, 300, (40, 40), (3, 3), 1, (1, 1)),
        (2, 6, 6, (9, 12), (3, 3), 2, (1, 1)),
        (1, 6, 6, (9, 13), (3, 3), 2, (0, 0)),
        (2, 16, 24, (11, 5), (1, 1), 1, (0, 0)),
        (1, 4, 8, (14, 14), (7, 7), 7, (0, 0)),
        (1, 2, 3, (5, 6), (1, 3), 1, (0, 0)),
    ] {
        let spec = Conv2dSpec { input, output, kernel, stride, padding };
        let x = random(1, &[batch, input, size.0, size.1]);
        let weight = random(2, &[output, input, kernel.0, kernel.1]);
        let bias = random(3, &[output]);
        let conv = Conv2d::new(weight.clone(), bias.clone(), spec);
        let padded = x
            .pad_with_zeros(2, padding.0, padding.0)
            .unwrap()
            .pad_with_zeros(3, padding.1, padding.1)
            .unwrap();
        let wanted = padded.conv2d(&weight, 0, stride, 1, 1).unwrap();
        let wanted = wanted.broadcast_add(&bias.reshape((1, output, 1, 1)).unwrap()).unwrap();
        check_close(&conv.forward(&x).unwrap(), &wanted, &format!("{spec:?} of {:?}", x.dims()));
        // A view that is not contiguous.
        let turned = x.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
        check_close(&conv.forward(&turned).unwrap(), &wanted, "a view");
    }
    let temporal = Conv2dSpec::temporal(4, 6);
    let (x, weight, bias) = (random(1, &[1, 4, 5, 12]), random(2, &[6, 4, 3, 1]), random(3, &[6]));
    let wanted = x.pad_with_zeros(2, 1, 1).unwrap().conv2d(&weight, 0, 1, 1, 1).unwrap();
    let wanted = wanted.broadcast_add(&bias.reshape((1, 6, 1, 1)).unwrap()).unwrap();
    check_close(&Conv2d::new(weight, bias, temporal).forward(&x).unwrap(), &wanted, "temporal");
}

#[test]
fn linear_layers_agree() {
    for (shape, output) in
        [(vec![1, 5], 3), (vec![2, 77, 24], 130), (vec![300, 64], 257), (vec![2, 700, 40], 1000)]
    {
        let input = *shape.last().unwrap();
        let (x, weight, bias) =
            (random(1, &shape), random(2, &[output, input]), random(3, &[output]));
        let weights = weights(&[("weight", weight.clone()), ("bias", bias.clone())]);
        let plain = x
            .broadcast_matmul(&weight.t().unwrap())
            .unwrap_or_else(|_| x.matmul(&weight.t().unwrap()).unwrap());
        let layer = Linear::load_without_bias(&weights, input, output).unwrap();
        check_close(&layer.forward(&x).unwrap(), &plain, &format!("{shape:?}"));
        let layer = Linear::load(&weights, input, output).unwrap();
        check_close(
            &layer.forward(&x).unwrap(),
            &plain.broadcast_add(&bias).unwrap(),
            &format!("{shape:?} with bias"),
        );
    }
}

#[test]
fn attention_agrees() {
    for (batch, heads, head, queries, keys) in [
        (1, 1, 8, 1, 1),
        (2, 3, 8, 77, 77),
        (1, 2, 40, 200, 77),
        (2, 1, 64, 64, 65),
        (5, 4, 4, 14, 14),
        (1, 1, 8, 90, 9000),
    ] {
        let width = heads * head;
        let q = random(1, &[batch, queries, width]);
        let (k, v) = (random(2, &[batch, keys, width]), random(3, &[batch, keys, width]));
        let split = |x: &Tensor, n: usize| {
            x.reshape((batch, n, heads, head))
                .unwrap()
                .transpose(1, 2)
                .unwrap()
                .contiguous()
                .unwrap()
        };
        let scores =
            split(&q, queries).matmul(&split(&k, keys).t().unwrap().contiguous().unwrap()).unwrap();
        let scores = (scores / (head as f64).sqrt()).unwrap();
        let finish = |scores: &Tensor| {
            let y = candle_nn::ops::softmax(scores, D::Minus1)
                .unwrap()
                .matmul(&split(&v, keys))
                .unwrap();
            y.transpose(1, 2).unwrap().reshape((batch, queries, width)).unwrap()
        };
        let about = format!("{batch}x{heads}x{head}, {queries} over {keys}");
        check_close(&attend(&q, &k, &v, heads, Mask::Open).unwrap(), &finish(&scores), &about);
        if queries == keys {
            let hidden: Vec<f32> = (0..queries * keys)
                .map(|index| if index % keys > index / keys { f32::NEG_INFINITY } else { 0.0 })
                .collect();
            let hidden = Tensor::from_vec(hidden, (queries, keys), &Device::Cpu).unwrap();
            let masked = scores.broadcast_add(&hidden).unwrap();
            check_close(
                &attend(&q, &k, &v, heads, Mask::Causal).unwrap(),
                &finish(&masked),
                &about,
            );
        }
    }
}

#[test]
fn norms_and_activations_agree() {
    for (shape, groups) in [
        (vec![1, 8, 5], 4),
        (vec![2, 32, 7, 9], 32),
        (vec![1, 64, 40, 41], 2),
        (vec![2, 16, 3, 5, 6], 8),
    ] {
        let channels = shape[1];
        // Far from zero, where a variance by squares would lose its digits.
        let x = (random(1, &shape) + 100.0).unwrap();
        let (weight, bias) = (random(2, &[channels]), random(3, &[channels]));
        let weights = weights(&[("weight", weight.clone()), ("bias", bias.clone())]);
        let norm = GroupNorm::load(&weights, groups, channels, 1e-5).unwrap();
        let exact = (&x - 100.0).unwrap();
        let wanted = candle_nn::GroupNorm::new(weight, bias, channels, groups, 1e-5)
            .unwrap()
            .forward(&exact)
            .unwrap();
        let near = |got: &Tensor, wanted: &Tensor| {
            let off = (got - wanted)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            assert!(off < 1e-3, "{shape:?}: {off}");
        };
        near(&norm.forward(&x).unwrap(), &wanted);
        near(&norm.forward_silu(&x).unwrap(), &wanted.silu().unwrap());
        check_close(&norm.forward(&exact).unwrap(), &wanted, &format!("{shape:?}"));
        check_close(&silu(&exact).unwrap(), &exact.silu().unwrap(), "silu");
    }
    let x = (random(1, &[3, 50, 64]) * 4.0).unwrap();
    let wanted =
        (x.narrow(2, 0, 32).unwrap() * x.narrow(2, 32, 32).unwrap().gelu_erf().unwrap()).unwrap();
    check_close(&geglu(&x).unwrap(), &wanted, "geglu");
    let x = random(1, &[2, 45, 70]);
    check_close(&swap_axes(&x).unwrap(), &x.transpose(1, 2).unwrap().contiguous().unwrap(), "swap");
}
