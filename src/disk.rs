//! What the disk says about itself; every layer may name this file.

use std::path::Path;

/// Bytes that an ordinary user may still write below `folder`; `None` where the system does not say.
pub(crate) fn free_space(folder: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes()).ok()?;
    let mut found = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends in a NUL and `found` is room for one answer, which is read only when there is one.
    let found = unsafe {
        if libc::statvfs(path.as_ptr(), found.as_mut_ptr()) != 0 {
            return None;
        }
        found.assume_init()
    };
    u64::try_from(u128::from(found.f_bavail) * u128::from(found.f_frsize)).ok()
}
