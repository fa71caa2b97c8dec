//! Tests of the tar walk.
