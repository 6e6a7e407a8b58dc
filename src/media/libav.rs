//! The thin border to libav: start-up once, its log as `tracing` events, its errors as ours, file names it cannot
//! misread. All `unsafe` of this layer is here.

use std::path::Path;
use std::sync::Once;

use ffmpeg_next as ffmpeg;

use super::Error;

/// Starts libav once for the process and sends its log to `tracing`; every public function calls it first.
pub(super) fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = ffmpeg::init() {
            tracing::debug!("libav start-up: {}", text(error));
        }
        log::to_tracing();
    });
}

/// libav's word for an error; the system's for errors of the system.
pub(super) fn text(error: ffmpeg::Error) -> String {
    match error {
        ffmpeg::Error::Other { errno } => std::io::Error::from_raw_os_error(errno).to_string(),
        other => other.to_string(),
    }
}

/// Whether libav only asks to be fed first.
pub(super) fn is_again(error: ffmpeg::Error) -> bool {
    error == ffmpeg::Error::Other { errno: ffmpeg::error::EAGAIN }
}

/// An error while doing `stage`.
pub(super) fn failed(stage: &'static str, error: ffmpeg::Error) -> Error {
    Error::Libav { stage, detail: text(error) }
}

/// An error while writing or reading `path`: a full disk and refused access keep their own kinds.
pub(super) fn failed_on(path: &Path, stage: &'static str, error: ffmpeg::Error) -> Error {
    match error {
        ffmpeg::Error::Other { errno }
            if errno != ffmpeg::error::EINVAL && errno != ffmpeg::error::ENOMEM =>
        {
            Error::file(path, std::io::Error::from_raw_os_error(errno))
        }
        other => failed(stage, other),
    }
}

/// `path` as a libav address: `file:` keeps a colon in a name from being taken for a protocol.
pub(super) fn address(path: &Path) -> Result<String, Error> {
    match path.to_str() {
        Some(name) if !name.contains('\0') => Ok(format!("file:{name}")),
        _ => Err(Error::Spec {
            field: "path",
            got: path.display().to_string(),
            wanted: "a name in UTF-8 without NUL".to_owned(),
        }),
    }
}

/// Every entry of a dictionary of `input`'s container; bytes that are not UTF-8 become U+FFFD.
pub(super) fn metadata(input: &ffmpeg::format::context::Input) -> Vec<(String, String)> {
    use ffmpeg::ffi::{AV_DICT_IGNORE_SUFFIX, av_dict_get};
    use std::ffi::CStr;

    let mut entries = Vec::new();
    let mut entry = std::ptr::null_mut();
    loop {
        // SAFETY: `input` owns a live format context, so its metadata pointer is null or a dictionary, both of which
        // `av_dict_get` takes; `entry` is null or what the call before returned for the same, unchanged dictionary.
        entry = unsafe {
            av_dict_get((*input.as_ptr()).metadata, c"".as_ptr(), entry, AV_DICT_IGNORE_SUFFIX)
        };
        if entry.is_null() {
            return entries;
        }
        // SAFETY: key and value of a dictionary entry are NUL-terminated strings that live as long as the dictionary.
        let (key, value) =
            unsafe { (CStr::from_ptr((*entry).key), CStr::from_ptr((*entry).value)) };
        entries.push((key.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
    }
}

/// On this ABI a C `va_list` argument is a plain pointer, which the bindings express exactly.
#[cfg(all(target_arch = "x86_64", unix))]
mod log {
    use std::ffi::{CStr, c_char, c_int, c_void};

    use super::ffmpeg::ffi::{
        __va_list_tag, AV_LOG_INFO, av_log_format_line2, av_log_set_callback,
    };

    /// Longest line that is kept.
    const LINE: usize = 1024;

    pub(super) fn to_tracing() {
        // SAFETY: the callback has the type libav documents and may be called from any thread: it owns no state.
        unsafe { av_log_set_callback(Some(on_line)) }
    }

    unsafe extern "C" fn on_line(
        from: *mut c_void,
        level: c_int,
        format: *const c_char,
        args: *mut __va_list_tag,
    ) {
        if level > AV_LOG_INFO || !tracing::enabled!(target: "libav", tracing::Level::DEBUG) {
            return;
        }
        let mut line: [c_char; LINE] = [0; LINE];
        let mut prefix: c_int = 1;
        let room = c_int::try_from(LINE).unwrap_or(0);
        // SAFETY: libav hands over `from`, `format` and `args` that fit each other; the buffer holds `room` bytes and
        // is always NUL-terminated by the call.
        let line = unsafe {
            av_log_format_line2(
                from,
                level,
                format,
                args,
                line.as_mut_ptr(),
                room,
                &raw mut prefix,
            );
            CStr::from_ptr(line.as_ptr())
        };
        tracing::debug!(target: "libav", level, "{}", line.to_string_lossy().trim_end());
    }
}

#[cfg(not(all(target_arch = "x86_64", unix)))]
mod log {
    /// Elsewhere the shape of a `va_list` differs; silence beats a wrong guess.
    pub(super) fn to_tracing() {
        super::ffmpeg::util::log::set_level(super::ffmpeg::util::log::Level::Quiet);
    }
}
