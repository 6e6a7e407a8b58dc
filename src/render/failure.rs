//! What an error of any layer means: its class, and what the user can do about it.
//!
//! The classes' own table (retry, HTTP status, exit code) is in `job::class`; here each layer's variant finds its row.

use super::Error;
use crate::job::class::ErrorClass;
use crate::{engine, hub, media, store};

/// The class of an error. A stop is no failure: ask for [`Error::Stopped`] first.
pub fn class(error: &Error) -> ErrorClass {
    match error {
        Error::Refused(faults) => faults.first().map_or(ErrorClass::Bug, |fault| fault.class),
        Error::Engine(error) => engine_class(error),
        Error::ShortOfMemory { .. } => ErrorClass::OutOfMemory,
        Error::Media(error) | Error::GivenImage { source: error, .. } => media_class(error),
        Error::Store(error) => store_class(error),
        Error::Hub(error) => hub_class(error),
        Error::Conflict { .. } | Error::Differs(_) => ErrorClass::Conflict,
        Error::Gone(_) | Error::Frames(_) => ErrorClass::OutputUnwritable,
        Error::Stopped | Error::Order(_) | Error::Record(_) => ErrorClass::Bug,
    }
}

/// Whether the device itself failed: its driver may answer nothing but errors from then on, until the process ends.
pub fn is_of_device(error: &Error) -> bool {
    matches!(error, Error::Engine(engine::Error::Device { .. }))
}

/// Whether the server of the store failed: nothing that the job did, and nothing that another attempt would not mend.
pub fn is_outage(error: &Error) -> bool {
    matches!(error, Error::Store(store::Error::Unanswered { .. }))
}

/// Whether memory of the device ran out in the middle of work.
pub(super) fn is_out_of_memory(error: &Error) -> bool {
    matches!(error, Error::Engine(engine::Error::OutOfMemory { .. }))
}

/// What helps, in one line without a full stop; `None` where the message says it all.
pub fn hint(error: &Error) -> Option<String> {
    if let Error::Hub(error) = error
        && let Some(hint) = error.hint()
    {
        return Some(hint);
    }
    if is_outage(error) {
        return Some("check that the server of the store answers".to_owned());
    }
    if let Error::Store(store::Error::Missing { .. }) | Error::Gone(_) = error {
        let advice = "all workers of a task queue share one store, or set `shared_store = false`";
        return Some(advice.to_owned());
    }
    let advice = match class(error) {
        ErrorClass::UnknownModel => {
            "`genvideo doctor` lists the models and the folders they are looked for in"
        }
        ErrorClass::MissingWeights => {
            "check that the model's folder is complete; `genvideo doctor` shows where it is"
        }
        ErrorClass::CorruptWeights | ErrorClass::WeightsNotFinite => {
            "the file is damaged: fetch it again"
        }
        ErrorClass::UnsupportedWeights => {
            "weights are read as safetensors; other formats have to be converted first"
        }
        ErrorClass::OutOfMemory => {
            "ask for a smaller size, or try `--memory low`, `--dtype f16` or `--device cpu`"
        }
        ErrorClass::DeviceError => {
            "`--device cpu` works everywhere; `genvideo doctor` shows what the device says"
        }
        ErrorClass::NonFinite => "`--dtype f32` has the range that half precision lacks",
        ErrorClass::DiskFull => {
            "free some space (`genvideo clean` removes old results), raise the quota, or choose another data folder"
        }
        ErrorClass::OutputUnwritable => {
            "check that the data folder and the store can be written; `genvideo doctor` shows where the folder is"
        }
        ErrorClass::UnsupportedFormat => "images are read as PNG, JPEG or WebP",
        ErrorClass::Conflict => "choose another job id",
        _ => return None,
    };
    Some(advice.to_owned())
}

fn engine_class(error: &engine::Error) -> ErrorClass {
    match error {
        engine::Error::Missing { .. }
        | engine::Error::Io { .. }
        | engine::Error::TensorsMissing { .. } => ErrorClass::MissingWeights,
        engine::Error::EmptyFile { .. } => ErrorClass::EmptyFile,
        engine::Error::TooLarge { .. } => ErrorClass::TooLarge,
        engine::Error::PathEscape { .. } => ErrorClass::PathEscape,
        engine::Error::ConfigSyntax { .. } => ErrorClass::CorruptConfig,
        engine::Error::ConfigUnsupported { .. } => ErrorClass::ConfigUnsupported,
        engine::Error::ConfigOutOfRange { .. } => ErrorClass::ConfigOutOfRange,
        engine::Error::WeightsFormat { .. } => ErrorClass::CorruptWeights,
        engine::Error::WeightsUnsupported { .. } => ErrorClass::UnsupportedWeights,
        engine::Error::WeightsHash { .. } => ErrorClass::WeightsHash,
        engine::Error::WeightsNotFinite { .. } => ErrorClass::WeightsNotFinite,
        engine::Error::TensorShape { .. } | engine::Error::TensorRank { .. } => {
            ErrorClass::WeightsShape
        }
        engine::Error::TensorType { .. } => ErrorClass::WeightsDtype,
        engine::Error::Tokenizer { .. } => ErrorClass::CorruptTokenizer,
        engine::Error::Request { .. } => ErrorClass::OutOfRange,
        engine::Error::Device { .. } | engine::Error::NoDevice { .. } => ErrorClass::DeviceError,
        engine::Error::OutOfMemory { .. } => ErrorClass::OutOfMemory,
        engine::Error::NonFinite { .. } => ErrorClass::NonFinite,
        engine::Error::Stopped | engine::Error::Checkpoint(_) | engine::Error::Internal(_) => {
            ErrorClass::Bug
        }
    }
}

fn media_class(error: &media::Error) -> ErrorClass {
    let name = error.class_name();
    ErrorClass::ALL.iter().copied().find(|class| class.name() == name).unwrap_or(ErrorClass::Bug)
}

fn store_class(error: &store::Error) -> ErrorClass {
    match error {
        store::Error::DiskFull { .. } => ErrorClass::DiskFull,
        store::Error::Conflict { .. } => ErrorClass::Conflict,
        store::Error::Key { .. }
        | store::Error::Suffix { .. }
        | store::Error::Address { .. }
        | store::Error::NotBuilt { .. }
        | store::Error::NotExclusive { .. } => ErrorClass::Bug,
        store::Error::Unwritable { .. }
        | store::Error::Unreadable { .. }
        | store::Error::Missing { .. }
        | store::Error::Corrupt { .. }
        | store::Error::Changed { .. }
        | store::Error::LockLost { .. }
        | store::Error::Unanswered { .. }
        | store::Error::Backend { .. } => ErrorClass::OutputUnwritable,
    }
}

/// The class of the library's errors.
pub(super) fn hub_class(error: &hub::Error) -> ErrorClass {
    match error {
        hub::Error::Unknown { .. }
        | hub::Error::NotPulled { .. }
        | hub::Error::UnknownLora { .. }
        | hub::Error::UnknownVae { .. }
        | hub::Error::Ambiguous { .. }
        | hub::Error::WrongTask { .. } => ErrorClass::UnknownModel,
        hub::Error::PathEscape { .. } => ErrorClass::PathEscape,
        hub::Error::NotAModel { .. } | hub::Error::Unreadable { .. } => ErrorClass::MissingWeights,
        hub::Error::Unsupported { .. } => ErrorClass::ConfigUnsupported,
        hub::Error::Malformed { .. } => ErrorClass::CorruptConfig,
        hub::Error::OutOfRange { .. } => ErrorClass::ConfigOutOfRange,
        hub::Error::Taken { .. } => ErrorClass::Conflict,
        hub::Error::DiskFull { .. } => ErrorClass::DiskFull,
        hub::Error::Unwritable { .. } => ErrorClass::OutputUnwritable,
    }
}
