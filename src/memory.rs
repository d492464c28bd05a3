//! Memory that goes back to the system.

/// From which size on the memory of a vector goes back, in bytes. The C library keeps less than that anyway.
const LARGE: usize = 64 * 1024;

/// Empties a vector. If it has grown large, its memory goes back to the system.
///
/// The C library maps a large block by itself, and unmaps it when it is freed. But glibc then takes blocks of up to that size
/// from the heap, and keeps twice as much of the heap for later (mallopt(3), M_MMAP_THRESHOLD). It does neither for a block
/// that has shrunk before.
pub(crate) fn give_back<T>(vec: &mut Vec<T>) {
    vec.clear();
    if vec.capacity() * size_of::<T>() >= LARGE {
        vec.shrink_to(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_vector_becomes_small_and_a_small_one_stays_as_it_is() {
        for (len, left) in [(1 << 20, 1), (1 << 10, 1 << 10)] {
            let mut vec = vec![1u8; len];
            give_back(&mut vec);
            assert_eq!((vec.len(), vec.capacity()), (0, left));
        }
    }
}
