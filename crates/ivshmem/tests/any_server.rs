// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of a server that sends anything.

mod exercise;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn the_client_bears_any_server(bytes in prop::collection::vec(any::<u8>(), 0..250)) {
        exercise::client(&bytes);
    }
}
