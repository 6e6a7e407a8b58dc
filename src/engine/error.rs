//! What can go wrong in the engine, as data; `render` maps each variant to an error class.

use std::path::PathBuf;

/// A fault of the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bytes that are no checkpoint of this run.
    #[error("cannot take the run up again: {0}")]
    Checkpoint(String),
    /// A file that the model folder must have is not there.
    #[error("`{}` is missing: wanted {wanted}", path.display())]
    Missing {
        /// The file or folder looked for.
        path: PathBuf,
        /// What it should have been.
        wanted: String,
    },
    /// A file could not be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file without content.
    #[error("`{}` is empty", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// A file larger than any of its kind.
    #[error("`{}` has more than {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most that is read.
        limit: u64,
    },
    /// A name or a link that leads out of the model's folder, or to a device.
    #[error("`{}` leads out of the model's folder or is no regular file", path.display())]
    PathEscape {
        /// The name or link.
        path: PathBuf,
    },
    /// A config file that is not the JSON object it should be, or lacks a value.
    #[error("`{}`: {problem}", path.display())]
    ConfigSyntax {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        problem: String,
    },
    /// A value that names something the engine does not have.
    #[error("`{file}`: `{key}` is {value}, which is not supported: wanted {wanted}")]
    ConfigUnsupported {
        /// Name of the config file.
        file: String,
        /// The key.
        key: String,
        /// The value as JSON.
        value: String,
        /// What is supported.
        wanted: String,
    },
    /// A number that cannot be meant.
    #[error("`{file}`: `{key}` is {value}: wanted {wanted}")]
    ConfigOutOfRange {
        /// Name of the config file.
        file: String,
        /// The key.
        key: String,
        /// The value as JSON.
        value: String,
        /// The range.
        wanted: String,
    },
    /// A weights file whose header or size lies.
    #[error("`{}` is not a sound safetensors file: {problem}", path.display())]
    WeightsFormat {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        problem: String,
    },
    /// A file that cannot be used as what it was given for, whatever its name says.
    #[error("`{}` is {what}", path.display())]
    WeightsUnsupported {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// A file other than the one whose hash is known.
    #[error("`{}` has the sha256 {got}: wanted {wanted}", path.display())]
    WeightsHash {
        /// The file.
        path: PathBuf,
        /// Its hash.
        got: String,
        /// The hash it should have.
        wanted: String,
    },
    /// A tensor that holds an infinity or a NaN.
    #[error("tensor `{name}` holds values that are not finite")]
    WeightsNotFinite {
        /// Its name.
        name: String,
    },
    /// A tensor of more dimensions than any model has.
    #[error("tensor `{name}` has {got} dimensions: wanted at most 8")]
    TensorRank {
        /// Its name.
        name: String,
        /// Its dimensions.
        got: usize,
    },
    /// Tensors that the configs call for and the files lack.
    #[error("`{}` lacks {} tensors: {}", path.display(), names.len(), first_names(names))]
    TensorsMissing {
        /// The folder.
        path: PathBuf,
        /// All of them.
        names: Vec<String>,
    },
    /// A tensor of another shape than the configs call for.
    #[error("tensor `{name}` has shape {got:?}: wanted {wanted:?}")]
    TensorShape {
        /// Its name.
        name: String,
        /// Shape in the file.
        got: Vec<usize>,
        /// Shape by the config.
        wanted: Vec<usize>,
    },
    /// A tensor of a type that no weight has.
    #[error("tensor `{name}` is of type {got}: wanted F16, BF16 or F32")]
    TensorType {
        /// Its name.
        name: String,
        /// Type in the file.
        got: String,
    },
    /// A tokenizer that cannot be used.
    #[error("tokenizer in `{}`: {problem}", path.display())]
    Tokenizer {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A request this model cannot serve.
    #[error("`{field}` is {value}: wanted {wanted}")]
    Request {
        /// The field of the request or setting.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is possible.
        wanted: String,
    },
    /// The GPU or its driver failed; another attempt may succeed.
    #[error("device failed: {problem}")]
    Device {
        /// What the driver said.
        problem: String,
    },
    /// This build cannot drive the device.
    #[error("{problem}")]
    NoDevice {
        /// What is missing.
        problem: String,
    },
    /// The device has not enough memory for this run.
    #[error("out of memory: {problem}")]
    OutOfMemory {
        /// What the driver said, or what is needed and what is there.
        problem: String,
    },
    /// Numbers ran out of range: an infinity or a NaN.
    #[error("{stage} holds values that are not finite, computed in {dtype}")]
    NonFinite {
        /// Where it was seen.
        stage: &'static str,
        /// The number type of the network that made them.
        dtype: &'static str,
    },
    /// The hook asked to stop.
    #[error("stopped on request")]
    Stopped,
    /// A fault of ours: tensors that do not fit together.
    #[error("internal engine fault: {0}")]
    Internal(String),
}

/// Result of the engine.
pub type Result<T> = std::result::Result<T, Error>;

/// Texts by which drivers and libraries say that memory ran out, in lower case.
const MEMORY_TEXTS: &[&str] = &[
    "cuda_error_out_of_memory",
    "out of memory",
    "failed to create metal resource",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "status_alloc_failed",
];

impl From<safetensors::SafeTensorError> for Error {
    fn from(error: safetensors::SafeTensorError) -> Self {
        Self::Checkpoint(error.to_string())
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        let problem = error.to_string();
        let lower = problem.to_lowercase();
        if MEMORY_TEXTS.iter().any(|text| lower.contains(text)) {
            return Self::OutOfMemory { problem };
        }
        if is_of_device(&error) { Self::Device { problem } } else { Self::Internal(problem) }
    }
}

/// How names of driver errors begin that candle passes on as texts.
const DRIVER_TEXTS: &[&str] = &["CUDA_ERROR_", "CUDNN_STATUS_", "CUBLAS_STATUS_", "NVRTC_ERROR_"];

/// Whether the driver said it, below whatever context candle put around it.
fn is_of_device(error: &candle_core::Error) -> bool {
    use candle_core::Error as Candle;
    match error {
        Candle::Cuda(_) | Candle::Metal(_) => true,
        Candle::Context { inner, .. }
        | Candle::WithPath { inner, .. }
        | Candle::WithBacktrace { inner, .. } => is_of_device(inner),
        Candle::Wrapped(wrapped) => {
            let text = wrapped.to_string();
            DRIVER_TEXTS.iter().any(|name| text.contains(name))
        }
        _ => false,
    }
}

/// A list that stays readable: the first eight names.
fn first_names(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text =
        names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
