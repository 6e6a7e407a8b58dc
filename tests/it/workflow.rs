//! The workflow on a real server, with the real renderer and the built-in models.

mod cancel;
mod ends;
mod input;
mod submit;
