//! Which parts of a model are in memory: all of them, or only the one at work.

use std::fmt;
use std::sync::Arc;

use super::Result;

/// What a loaded model keeps in memory between its uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residency {
    /// Every part: quick.
    #[default]
    Together,
    /// No part: each is read when its turn comes and dropped before the next one is.
    InTurn,
}

/// Reads a part of a model from its files.
type Read<T> = dyn Fn() -> Result<T> + Send + Sync;

/// One part of a model.
pub(super) enum Part<T> {
    /// In memory.
    Kept(Arc<T>),
    /// Read for each use.
    OnDemand(Box<Read<T>>),
}

impl<T> Part<T> {
    /// The part that `read` reads, now or later.
    pub(super) fn new(
        residency: Residency,
        read: impl Fn() -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        match residency {
            Residency::Together => Ok(Self::Kept(Arc::new(read()?))),
            Residency::InTurn => Ok(Self::OnDemand(Box::new(read))),
        }
    }

    /// The part, for as long as it is held.
    pub(super) fn get(&self) -> Result<Arc<T>> {
        match self {
            Self::Kept(part) => Ok(part.clone()),
            Self::OnDemand(read) => Ok(Arc::new(read()?)),
        }
    }
}

impl<T> fmt::Debug for Part<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Kept(_) => "Kept",
            Self::OnDemand(_) => "OnDemand",
        })
    }
}
