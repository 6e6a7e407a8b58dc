//! Logarithm, sine and cosine in single precision as torch's `normal_fill` computes them on x86: the polynomials of
//! the Cephes library (Moshier, `logf.c` and `sinf.c`) with fused multiply-add.
//!
//! Every operation is one IEEE rounding, so the results are the same bits on every machine.

/// Polynomial of the logarithm, highest power first.
const LOGARITHM: [f32; 9] = [
    7.037_683_6e-2,
    -1.151_461e-1,
    0.116_769_984,
    -1.242_014_1e-1,
    1.424_932_3e-1,
    -1.666_805_7e-1,
    0.200_007_14,
    -2.499_999_4e-1,
    3.333_333e-1,
];
/// ln 2 in two parts, the first with few digits.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// π/4 in three parts, the first ones with few digits.
const QUARTER: [f32; 3] = [0.785_156_25, 2.418_756_5e-4, 3.774_895e-8];
/// Polynomial of the sine, highest power first.
const SINE: [f32; 3] = [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1];
/// Polynomial of the cosine, highest power first.
const COSINE: [f32; 3] = [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2];

/// Horner's scheme.
fn polynomial(coefficients: &[f32], x: f32) -> f32 {
    coefficients.iter().copied().reduce(|sum, next| sum.mul_add(x, next)).unwrap_or_default()
}

/// The natural logarithm of a normal number above 0.
pub(super) fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    let mantissa = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000); // 0.5 to 1
    let exponent = (bits >> 23) as f32 - 126.0;
    let (exponent, x) = if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        (exponent - 1.0, (mantissa - 1.0) + mantissa)
    } else {
        (exponent, mantissa - 1.0)
    };
    let square = x * x;
    let y = (polynomial(&LOGARITHM, x) * x).mul_add(square, exponent * LN_2[1]);
    let y = square.mul_add(-0.5, y);
    exponent.mul_add(LN_2[0], x + y)
}

/// Sine and cosine of an angle from 0 to 2π.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an angle has at most eight eighths"
)]
pub(super) fn sin_cos(angle: f32) -> (f32, f32) {
    let eighth = ((angle * (4.0 / std::f32::consts::PI)) as u32 + 1) & !1;
    let x = QUARTER.iter().fold(angle, |x, part| (eighth as f32).mul_add(-part, x));
    let square = x * x;
    let cos = polynomial(&COSINE, square) * square;
    let cos = cos.mul_add(square, -(square * 0.5)) + 1.0;
    let sin = (polynomial(&SINE, square) * square).mul_add(x, x);
    let (sin, cos) = if eighth & 2 == 0 { (sin, cos) } else { (cos, sin) };
    let sin = if eighth & 4 == 0 { sin } else { -sin };
    let cos = if eighth.wrapping_sub(2) & 4 == 0 { -cos } else { cos };
    (sin, cos)
}
