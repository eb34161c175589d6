// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a server may do wrong.

/// A server does not keep to the protocol. The connection is given up then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// It does not begin with the magic numbers of a newstyle negotiation.
    #[error("what it says first is not an NBD greeting")]
    Greeting,
}
