//! Models whose manifests are part of the program while their weights are not: they can be pulled by name.

use std::path::{Path, PathBuf};

use super::folder::Described;
use super::manifest::{self, Manifest, Upstream};
use super::{Error, Task};

/// Name and manifest of each.
const MANIFESTS: [(&str, &str); 7] = [
    ("sd15", include_str!("../../models/sd15.toml")),
    ("sd21", include_str!("../../models/sd21.toml")),
    ("sd-turbo", include_str!("../../models/sd-turbo.toml")),
    ("sdxl-base", include_str!("../../models/sdxl-base.toml")),
    ("sdxl-turbo", include_str!("../../models/sdxl-turbo.toml")),
    ("svd", include_str!("../../models/svd.toml")),
    ("svd-xt", include_str!("../../models/svd-xt.toml")),
];

/// A model that may or may not be on this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// What it is called.
    pub name: &'static str,
    /// What it does.
    pub task: Task,
    /// Its manifest, complete without the model's own configs.
    pub manifest: Manifest,
    /// Where it comes from.
    pub upstream: Upstream,
}

/// Every model that can be pulled by name.
pub fn all() -> Vec<Known> {
    let known = |(name, text): (&'static str, &str)| {
        parse(name, text).expect("the manifests are part of the program, and tested")
    };
    MANIFESTS.into_iter().map(known).collect()
}

/// The one of that name, or from that repository.
pub fn named(name: &str) -> Option<Known> {
    all().into_iter().find(|known| known.name == name || known.upstream.repo == name)
}

/// Its manifest as it lies over the defaults of a folder.
pub(super) fn described(name: &str) -> Option<Described> {
    let (name, text) = MANIFESTS.into_iter().find(|(known, _)| *known == name)?;
    let path = PathBuf::from(format!("{name}.toml"));
    let mut written = manifest::parse(&path, text).ok()?;
    written.name = Some(name.to_owned());
    Some((path, written))
}

fn parse(name: &'static str, text: &str) -> Result<Known, Error> {
    let path = PathBuf::from(format!("{name}.toml"));
    let written = manifest::parse(&path, text)?;
    let family = written.family.clone().unwrap_or_default();
    let defaults = manifest::of_family(name, &family, (512, 512), 64);
    let missing = |what: &str| Error::Malformed {
        path: Path::new(name).with_extension("toml"),
        message: format!("no `{what}`"),
    };
    let task = written.task.ok_or_else(|| missing("task"))?;
    let manifest = manifest::complete(&path, written, defaults)?;
    let upstream = manifest.upstream.clone().ok_or_else(|| missing("upstream"))?;
    Ok(Known { name, task, manifest, upstream })
}
