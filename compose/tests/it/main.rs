//! The brokers, `lab`, the harness, and what keeps the repository consistent.

mod docker;
mod harness;
mod lab;
mod proxy;
mod repository;
mod secure;
mod workspace;
