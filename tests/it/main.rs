//! The one test binary: every area is a module here.

#[cfg(feature = "failpoints")]
mod chaos; // workers, servers and disks that fail on purpose
mod cli; // the command line: help, messages, exit codes, a whole job
mod config; // where each setting comes from
mod corpus; // hostile model files, each with its class
mod devserver; // the embedded Temporal server: found, shared, left
mod engine; // noise, schedules, models, refusals
mod fleet; // several workers on one data folder
mod goldens; // numbers of diffusers, within each tensor's tolerance
mod hub; // models by name, manifests, the embedded pair
mod job; // the wire contract, hostile requests, policies
mod media; // files that players and browsers read as meant
mod one_file; // models and LoRAs that are one file; what `inspect` says
mod python; // a Python client of the Temporal SDK
mod receipt; // the same bytes for any number of threads, `verify`, `replay`
mod render; // one stage after the other, without Temporal
mod replay; // recorded histories against today's workflow
#[cfg(feature = "s3")]
mod s3; // a store in a bucket: races, workers that share it, refusals
mod store; // blobs, manifests, clean-up
mod support; // what tests share: folders, servers, jobs
mod tidy; // layers and file rules
mod workflow; // the workflow on a real server
