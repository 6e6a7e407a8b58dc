//! Models that were pulled or imported, by their lock files: are their files as they were, and away with them.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::writing;
use super::folder::{entries, repo_folder, snapshot, sorted};
use super::lock::{Lock, Locked};
use super::{Error, Library, digest, known};

/// A model that was pulled or imported.
#[derive(Clone, Debug)]
pub struct Installed {
    /// What it is called here.
    pub name: String,
    /// What its lock file says; `None` for a pull that did not come to its end.
    pub lock: Option<Lock>,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    /// A repository's folder in the Hugging Face cache.
    Repo(PathBuf),
    /// A models folder.
    Dir(PathBuf),
}

/// A file that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub what: String,
}

impl Library {
    /// The pulled or imported model called `name`.
    pub fn installed(&self, name: &str) -> Result<Option<Installed>, Error> {
        super::confine(name)?;
        for dir in &self.places.models_dirs {
            if let Some(lock) = Lock::read(&Lock::of_import(dir, name))? {
                let place = Place::Dir(dir.clone());
                return Ok(Some(Installed { name: name.to_owned(), lock: Some(lock), place }));
            }
        }
        let known = known::named(name);
        let repo = known.as_ref().map_or(name, |known| &known.upstream.repo);
        let folder = repo_folder(&self.hf_cache(), repo);
        let lock = Lock::read(&Lock::of_repo(&folder))?;
        if lock.is_none() && !folder.join(PULL_MARK).exists() {
            return Ok(None);
        }
        let name = known.map_or_else(|| name.to_owned(), |known| known.name.to_owned());
        Ok(Some(Installed { name, lock, place: Place::Repo(folder) }))
    }

    /// Names of all pulled and imported models.
    pub fn installed_names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for path in self.places.models_dirs.iter().flat_map(|dir| sorted(dir)) {
            if path.extension().is_some_and(|ending| ending == "lock") && Lock::is_ours(&path) {
                names.push(path.file_stem().unwrap_or_default().to_string_lossy().into_owned());
            }
        }
        for folder in sorted(&self.hf_cache()) {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            if let Some(repo) = name.strip_prefix("models--")
                && Lock::is_ours(&Lock::of_repo(&folder))
            {
                let repo = repo.replacen("--", "/", 1);
                names.push(known::named(&repo).map_or(repo, |known| known.name.to_owned()));
            }
        }
        names
    }

    /// Files of the Hugging Face cache's model `name` that are not what the names of their blobs say: a model that
    /// another program put there has no lock file.
    pub fn verify_by_blobs(&self, name: &str) -> Result<(usize, Vec<Fault>), Error> {
        let known = known::named(name);
        let repo = known.as_ref().map_or(name, |known| &known.upstream.repo);
        let Some(snapshot) = snapshot(&repo_folder(&self.hf_cache(), repo))? else {
            return Ok((0, Vec::new()));
        };
        let (mut compared, mut faults) = (0, Vec::new());
        for link in links(&snapshot) {
            let target = fs::read_link(&link).unwrap_or_default();
            let hash = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let found = match hash.len() {
                64 => digest::sha256(&link),
                40 => digest::git_blob(&link),
                _ => continue,
            };
            compared += 1;
            let what = match found {
                Ok(found) if found == hash => continue,
                Ok(found) => format!("its hash is {found}, wanted {hash}"),
                Err(error) => error.to_string(),
            };
            faults.push(Fault { path: link, what });
        }
        Ok((compared, faults))
    }
}

/// The file that says that a pull of ours was at work in a repository's folder; it names the blobs that pulls began.
pub(super) const PULL_MARK: &str = "genvideo.pull";

impl Installed {
    /// The folder its files are in.
    pub fn folder(&self) -> PathBuf {
        let commit = self.lock.as_ref().and_then(|lock| lock.commit.clone());
        match &self.place {
            Place::Dir(dir) => dir.clone(),
            Place::Repo(repo) => {
                commit.map_or_else(|| repo.clone(), |commit| repo.join("snapshots").join(commit))
            }
        }
    }

    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        self.files().iter().map(|file| file.bytes).sum()
    }

    /// Its files.
    pub fn files(&self) -> &[Locked] {
        self.lock.as_ref().map_or(&[], |lock| &lock.files)
    }

    /// Every file that is not as it was.
    pub fn verify(&self) -> Vec<Fault> {
        let folder = self.folder();
        let fault = |file: &Locked| {
            file.fault(&folder).map(|what| Fault { path: folder.join(&file.path), what })
        };
        self.files().iter().filter_map(fault).collect()
    }

    /// Its files that a removal takes away.
    pub fn own_files(&self) -> impl Iterator<Item = &Locked> {
        self.files().iter().filter(|file| !file.kept)
    }

    /// Removes what the pull or the import put there, and nothing else. Waits for the end of a pull.
    pub fn remove(&self) -> Result<(), Error> {
        let dir = match &self.place {
            Place::Repo(repo) => return remove_pulled(repo),
            Place::Dir(dir) => dir,
        };
        let linked = self.lock.as_ref().and_then(|lock| lock.linked.clone());
        if let Some(link) = linked {
            take_away(&dir.join(link))?;
        } else {
            for file in self.files() {
                remove_below(dir, &file.path)?;
            }
        }
        take_away(&Lock::of_import(dir, &self.name))
    }
}

/// Keeps other pulls and removals of the repository's folder away; `waits` hears that one is at work.
pub(super) fn hold(repo: &Path, waits: &mut dyn FnMut()) -> Result<File, Error> {
    let path = repo.join(PULL_MARK);
    let failed = |source| writing(&path, source);
    loop {
        fs::create_dir_all(repo).map_err(failed)?;
        let file = match File::options().create(true).append(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // removed just now
            opened => opened.map_err(failed)?,
        };
        if file.try_lock().is_err() {
            waits();
            file.lock().map_err(failed)?;
        }
        // A removal that was waited for took the file away: then it keeps nobody else away.
        let held = file.metadata().map_err(failed)?;
        if fs::metadata(&path).is_ok_and(|at| (at.dev(), at.ino()) == (held.dev(), held.ino())) {
            return Ok(file);
        }
    }
}

/// Removes a pull's links and blobs, and the repository's folder if nothing else is in it.
fn remove_pulled(repo: &Path) -> Result<(), Error> {
    let _held = hold(repo, &mut || ())?;
    let (lock, mark) = (Lock::of_repo(repo), repo.join(PULL_MARK));
    if let Some(Lock { commit: Some(commit), files, .. }) = Lock::read(&lock)? {
        drop_links(repo, &commit, files.iter())?;
    }
    let (blobs, snapshots, refs) = (repo.join("blobs"), repo.join("snapshots"), repo.join("refs"));
    let begun = fs::read_to_string(&mark).unwrap_or_default();
    let begun = begun.lines().flat_map(|name| [name.to_owned(), format!("{name}.incomplete")]);
    free(repo, begun.map(|name| blobs.join(name)))?;
    take_away(&lock)?;
    // It fails for one that is not empty.
    let _ = fs::remove_dir(&snapshots);
    if !snapshots.exists() {
        let gone = fs::remove_dir_all(&refs);
        gone.or_else(missing_is_fine).map_err(|source| writing(&refs, source))?;
    }
    let _ = fs::remove_dir(&blobs);
    // Last, as a pull may wait for it.
    take_away(&mark)?;
    // What other programs left there keeps the folder.
    let _ = fs::remove_dir(repo);
    Ok(())
}

/// Removes those of these blobs that no snapshot links to.
fn free(repo: &Path, blobs: impl Iterator<Item = PathBuf>) -> Result<(), Error> {
    let Ok(folder) = repo.join("blobs").canonicalize() else { return Ok(()) };
    let links = links(&repo.join("snapshots"));
    let linked: HashSet<PathBuf> =
        links.iter().filter_map(|link| link.canonicalize().ok()).collect();
    for blob in blobs.filter_map(|blob| blob.canonicalize().ok()) {
        if blob.parent() == Some(&*folder) && !linked.contains(&blob) {
            take_away(&blob)?;
        }
    }
    Ok(())
}

/// Removes those of the files of the snapshot `commit` that are ours, the blobs that nothing else links to, and the
/// snapshot and its names if it is empty then.
pub(super) fn drop_links<'a>(
    repo: &Path,
    commit: &str,
    files: impl Iterator<Item = &'a Locked>,
) -> Result<(), Error> {
    let folder = repo.join("snapshots").join(commit);
    let mut freed = HashSet::new();
    for file in files.filter(|file| !file.kept) {
        freed.extend(folder.join(&file.path).canonicalize());
        remove_below(&folder, &file.path)?;
    }
    // It fails for one that is not empty.
    let _ = fs::remove_dir(&folder);
    free(repo, freed.into_iter())?;
    let names = if folder.exists() { Vec::new() } else { links(&repo.join("refs")) };
    for name in names {
        if fs::read_to_string(&name).is_ok_and(|found| found.trim() == commit) {
            take_away(&name)?;
        }
    }
    Ok(())
}

/// Removes a file, and the folders that it leaves empty.
fn remove_below(folder: &Path, path: &str) -> Result<(), Error> {
    let file = folder.join(path);
    let parent = file.parent().unwrap_or(folder);
    let inside = match (parent.canonicalize(), folder.canonicalize()) {
        (Ok(parent), Ok(folder)) => parent.starts_with(folder),
        _ => return Ok(()), // gone already
    };
    if !inside {
        return Err(Error::PathEscape { path: file.display().to_string() });
    }
    take_away(&file)?;
    let mut empty = Path::new(path).parent();
    while let Some(path) = empty.filter(|path| !path.as_os_str().is_empty()) {
        // It fails for one that is not empty.
        if fs::remove_dir(folder.join(path)).is_err() {
            break;
        }
        empty = path.parent();
    }
    Ok(())
}

/// Files and links below a folder, hidden ones as well.
fn links(folder: &Path) -> Vec<PathBuf> {
    entries(folder)
        .into_iter()
        .flat_map(|path| if path.is_dir() { links(&path) } else { vec![path] })
        .collect()
}

fn take_away(path: &Path) -> Result<(), Error> {
    fs::remove_file(path).or_else(missing_is_fine).map_err(|source| writing(path, source))
}

fn missing_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
