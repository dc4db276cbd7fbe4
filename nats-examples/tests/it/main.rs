//! What the headers of the NATS examples claim, tried on a real broker.

mod broker_absent;
mod closed_pipe;
mod core;
mod jetstream;
mod nats;
mod network;
mod publish_subscribe;
mod requests;
mod secure;
mod stores;
