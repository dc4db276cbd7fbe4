//! The brokers, `lab`, the harness, and what keeps the repository consistent.

mod broker;
mod fetch;
mod harness;
mod lab;
mod repository;
mod workspace;
