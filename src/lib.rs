//! `genvideo`: a prompt goes in, an mp4 comes out, offline.
//!
//! The walk of one job, with where to read on: a client's JSON becomes a valid job ([`job`]); a Temporal workflow
//! decides what happens next ([`worker`]); its activities call one stage each ([`render`]), which takes a model from
//! the [`hub`], lets the [`engine`] make pixels, the [`media`] layer a file, and the [`store`] keep it under its
//! content hash. [`client`] submits and watches, [`devserver`] runs a Temporal server where there is none, and
//! [`cli`] is the face of it all. `ARCHITECTURE.md` holds the layer table that `tests/it/tidy.rs` checks.

pub mod cli;
pub mod client;
pub mod config;
pub mod devserver;
mod disk;
pub mod engine;
pub mod failpoint;
pub mod hub;
pub mod job;
pub mod media;
pub mod render;
pub mod store;
pub mod worker;
