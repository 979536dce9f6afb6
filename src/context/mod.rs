//! What `COPY` and `ADD` may see: the build context and what is left out of it.

pub mod glob;
pub mod ignore;
