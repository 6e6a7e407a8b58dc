//! Functions of one number that compilers can vectorise, and the switch to wider vectors at run time.

/// Rounds to the nearest whole number when added and subtracted; its low bits then hold that number.
const ROUND: f32 = 12_582_912.0;

/// `e^x` to about one unit in the last place; outside -87..88 it saturates, NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    // ln 2 in two parts, so that the rest keeps its digits.
    let r = (x - whole * 0.693_359_4) - whole * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_65;
    let p = p * r + 0.5;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    (p * r * r + r + 1.0) * f32::from_bits(power)
}

/// The error function to a few units in the last place, as a quotient of polynomials.
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let x = x.clamp(-3.832_507, 3.832_507);
    let s = x * x;
    let p = 2.290_506_6e-4;
    let p = p * s + 3.408_291e-3;
    let p = p * s + 5.095_569_5e-2;
    let p = p * s + 0.185_208_32;
    let p = p * s + std::f32::consts::FRAC_2_SQRT_PI;
    let q = -1.179_160_3e-7;
    let q = q * s + 2.354_796_6e-5;
    let q = q * s + 1.017_962_5e-3;
    let q = q * s + 1.407_047e-2;
    let q = q * s + 0.110_985_05;
    let q = q * s + 0.497_469_25;
    let q = q * s + 1.0;
    x * p / q
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// The exact GELU.
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// Defines a function over slices whose loops are compiled twice: for every machine, and for AVX2 where the machine
/// has it. Both do the same operations in the same order, so the results are equal bit by bit.
macro_rules! vectorised {
    ($(#[$meta:meta])* fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $(-> $output:ty)? $body:block) => {
        $(#[$meta])*
        pub(super) fn $name($($argument: $kind),*) $(-> $output)? {
            #[inline(always)]
            fn plain($($argument: $kind),*) $(-> $output)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide($($argument: $kind),*) $(-> $output)? {
                    plain($($argument),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the one feature it needs was just found.
                    return unsafe { wide($($argument),*) };
                }
            }
            plain($($argument),*)
        }
    };
}
pub(super) use vectorised;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_within_a_few_last_places() {
        for step in -30_000..=30_000_i16 {
            let x = f32::from(step) / 1_500.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 2e-7, "exp({x})");
            let exact = f64::from(candle_core::cpu::erf::erf_f32(x));
            assert!(
                (f64::from(erf(x)) - exact).abs() < 4e-7,
                "erf({x}) is {} wanted {exact}",
                erf(x)
            );
        }
        assert!(exp(f32::NAN).is_nan() && silu(f32::NAN).is_nan() && gelu(f32::NAN).is_nan());
        assert!(silu(-200.0).abs() < 1e-30);
    }
}
