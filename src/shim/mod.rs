//! Speaks containerd: the task service, processes, their stdio, events and ends.
//!
//! One request, followed: [`service`] finds the [`container`]; [`create`], [`start`], [`restore`],
//! [`checkpoint`] and [`delete`] are the chapters of its life, [`state`] says which may follow
//! which. Children are reaped by [`reaper`], bytes moved by [`io`], and what the machine below
//! provides is behind [`host`].

pub mod artefacts;
pub mod bootstrap;
pub mod checkpoint;
pub mod container;
pub mod control;
pub mod create;
pub mod delete;
mod early_join;
pub mod error;
pub mod events;
mod exits;
mod going_back;
mod health_check;
pub mod hold;
pub mod hooks;
pub mod host;
pub mod io;
mod kill;
pub mod logger;
pub mod netns;
pub mod orphans;
pub mod process;
pub mod proto;
mod prove;
pub mod reaper;
mod recover;
pub mod restore;
pub mod rollback;
pub mod run_dir;
mod scene;
pub mod service;
pub mod spec;
pub mod start;
pub mod state;
#[cfg(test)]
mod tests;
pub mod turns;
mod undo;
mod view;
