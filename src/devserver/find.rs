//! Where the Temporal CLI is.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::Error;

/// The Temporal CLI: `cli` when given, else `temporal` on PATH, else `<cache_dir>/tools/temporal`.
pub fn find(cli: Option<&Path>, cache_dir: &Path) -> Result<PathBuf, Error> {
    find_on(cli, env::var_os("PATH").as_deref(), cache_dir)
}

fn find_on(cli: Option<&Path>, path: Option<&OsStr>, cache_dir: &Path) -> Result<PathBuf, Error> {
    let searched = match cli {
        Some(program) => vec![program.to_owned()],
        None => {
            let on_path =
                path.into_iter().flat_map(env::split_paths).filter(|folder| folder.is_absolute());
            on_path
                .map(|folder| folder.join("temporal"))
                .chain([cache_dir.join("tools").join("temporal")])
                .collect()
        }
    };
    match searched.iter().find(|program| is_executable(program)) {
        Some(program) => Ok(program.clone()),
        None => Err(Error::NoProgram { searched }),
    }
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(folder: &Path, mode: u32) -> PathBuf {
        fs::create_dir_all(folder).unwrap();
        let path = folder.join("temporal");
        fs::write(&path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn the_named_program_comes_before_path_and_path_before_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let path = env::join_paths([at("one"), at("two")]).unwrap();
        let find = |cli: Option<&Path>| find_on(cli, Some(&path), &at("cache"));

        let Err(Error::NoProgram { searched }) = find(None) else { panic!("nothing is there") };
        assert_eq!(searched, [at("one/temporal"), at("two/temporal"), at("cache/tools/temporal")]);
        let cached = program(&at("cache/tools"), 0o755);
        assert_eq!(find(None).unwrap(), cached);
        program(&at("one"), 0o644);
        let second = program(&at("two"), 0o755);
        assert_eq!(find(None).unwrap(), second, "a file that is not executable is passed over");
        assert_eq!(find(Some(&cached)).unwrap(), cached);
        assert!(
            find(Some(&at("elsewhere"))).is_err(),
            "a named program is not replaced by another"
        );
    }
}
