//! The workflow on a real server, with the real renderer and the built-in models.

mod approve;
mod cancel;
mod deaths;
mod ends;
mod input;
mod pause;
mod submit;
mod turns;
