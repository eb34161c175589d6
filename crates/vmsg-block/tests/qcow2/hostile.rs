// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that are made to do harm.
