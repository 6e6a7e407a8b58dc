//! Error classes: the `type` of a workflow failure and the `code` in JSON, with what follows from each.
//!
//! One table for the whole product: class, HTTP status, exit code, retryable. Layers map their own errors to a
//! class; nobody else decides what an error means.

use serde::{Deserialize, Serialize};

/// One fault of a request: which field, what it held, what was allowed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What kind of fault.
    pub class: ErrorClass,
    /// The field, for example `width` or `loras[1].scale`; empty for the request as a whole.
    pub field: String,
    /// Lower case sentence with the value and the allowed range, without a full stop.
    pub message: String,
}

impl Fault {
    /// A fault of `field`.
    pub fn new(class: ErrorClass, field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { class, field: field.into(), message: message.into() }
    }
}

macro_rules! classes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $http:literal $exit:literal $retry:literal;)*) => {
        /// What went wrong, in one word that clients can match on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorClass { $($(#[$doc])* #[serde(rename = $name)] $variant,)* }

        impl ErrorClass {
            /// Every class.
            pub const ALL: &'static [ErrorClass] = &[$(ErrorClass::$variant),*];
            /// The name on the wire.
            pub fn name(self) -> &'static str { match self { $(Self::$variant => $name),* } }
            /// Status of an HTTP answer.
            pub fn http_status(self) -> u16 { match self { $(Self::$variant => $http),* } }
            /// Exit code of the command line.
            pub fn exit_code(self) -> u8 { match self { $(Self::$variant => $exit),* } }
            /// Whether another attempt may succeed.
            pub fn retryable(self) -> bool { match self { $(Self::$variant => $retry),* } }
        }
    };
}

classes! {
    /// Not one JSON document: broken, more than one, a key given twice, a number without a finite value.
    InvalidJson "INVALID_JSON" 400 2 false;
    /// A required field is absent.
    MissingField "MISSING_FIELD" 400 2 false;
    /// A field nobody knows.
    UnknownField "UNKNOWN_FIELD" 400 2 false;
    /// A field of the wrong JSON type.
    WrongType "WRONG_TYPE" 400 2 false;
    /// A number or text outside its range.
    OutOfRange "OUT_OF_RANGE" 400 2 false;
    /// More bytes than allowed.
    TooLarge "TOO_LARGE" 413 2 false;
    /// JSON nested too deep.
    TooDeep "TOO_DEEP" 400 2 false;
    /// Empty prompt, or control characters in it.
    InvalidPrompt "INVALID_PROMPT" 400 2 false;
    /// Empty or too long user id, or control characters in it.
    InvalidUserId "INVALID_USER_ID" 400 2 false;
    /// No style of that name.
    UnknownStyle "UNKNOWN_STYLE" 400 2 false;
    /// Neither IMAGE nor VIDEO.
    UnknownJobType "UNKNOWN_JOB_TYPE" 400 2 false;
    /// No model of that name on this machine.
    UnknownModel "UNKNOWN_MODEL" 404 4 false;
    /// An address where an id was expected.
    UrlRefused "URL_REFUSED" 400 2 false;
    /// A file without content.
    EmptyFile "EMPTY_FILE" 422 2 false;
    /// A file format we do not read.
    UnsupportedFormat "UNSUPPORTED_FORMAT" 415 2 false;
    /// An image that does not decode.
    CorruptImage "CORRUPT_IMAGE" 422 2 false;
    /// An image over the limits of side, pixels, bytes or memory.
    ImageTooLarge "IMAGE_TOO_LARGE" 413 2 false;
    /// An image too small to work on.
    ImageTooSmall "IMAGE_TOO_SMALL" 422 2 false;
    /// A weight file that cannot be what it says.
    CorruptWeights "CORRUPT_WEIGHTS" 422 4 false;
    /// Tensors or files of the model are missing.
    MissingWeights "MISSING_WEIGHTS" 404 4 false;
    /// A weight format we do not read, pickles among them.
    UnsupportedWeights "UNSUPPORTED_WEIGHTS" 415 4 false;
    /// A tensor whose shape is not the architecture's.
    WeightsShape "WEIGHTS_SHAPE" 422 4 false;
    /// A tensor of a type we do not compute with.
    WeightsDtype "WEIGHTS_DTYPE" 422 4 false;
    /// NaN or infinity in the weights.
    WeightsNotFinite "WEIGHTS_NOT_FINITE" 422 4 false;
    /// Content other than the pinned hash.
    WeightsHash "WEIGHTS_HASH" 422 4 false;
    /// A model configuration that does not parse.
    CorruptConfig "CORRUPT_CONFIG" 422 4 false;
    /// A model configuration with senseless numbers.
    ConfigOutOfRange "CONFIG_OUT_OF_RANGE" 422 4 false;
    /// A model configuration for something we do not implement.
    ConfigUnsupported "CONFIG_UNSUPPORTED" 422 4 false;
    /// Tokenizer files that do not parse or do not fit the model.
    CorruptTokenizer "CORRUPT_TOKENIZER" 422 4 false;
    /// A path that leaves its folder.
    PathEscape "PATH_ESCAPE" 422 4 false;
    /// Not enough memory for this job.
    OutOfMemory "OUT_OF_MEMORY" 507 5 false;
    /// The accelerator failed.
    DeviceError "DEVICE_ERROR" 500 5 true;
    /// NaN or infinity where a picture should be.
    NonFinite "NON_FINITE" 500 1 false;
    /// The encoder or muxer failed.
    EncodeError "ENCODE_ERROR" 500 1 true;
    /// No space left.
    DiskFull "DISK_FULL" 507 1 true;
    /// The store cannot be written or read.
    OutputUnwritable "OUTPUT_UNWRITABLE" 500 1 true;
    /// The job already ended with another result.
    Conflict "CONFLICT" 409 1 false;
    /// The job killed its worker again and again.
    Poison "POISON" 500 1 false;
    /// A fault of ours.
    Bug "BUG" 500 1 false;
}

impl std::fmt::Display for ErrorClass {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}
