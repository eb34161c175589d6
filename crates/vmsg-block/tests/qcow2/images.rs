// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images of all kinds.
