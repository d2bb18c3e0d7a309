// Defines a buffer that one thread keeps for later calls. It is used instead of std::vector, whose member functions
// would be compiled once per instruction set under the same symbol name. The linker would keep only one of these
// copies, and the processor might not be able to run it.
#pragma once

#include <cstdint>
#include <new>

namespace efft::EFFT_ISA {

// The buffer never shrinks. If it were freed after each call, the new memory would cause page faults in the next call.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete[](data_, ALIGNED); }

  // Returns room for `size` elements with undefined contents.
  T* room(int64_t size) {
    if (size > size_) {
      ::operator delete[](data_, ALIGNED);
      data_ = nullptr;
      size_ = 0;
      data_ = static_cast<T*>(::operator new[](size * sizeof(T), ALIGNED));
      size_ = size;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t ALIGNED{64};  // a register, or a row of a tile, is then in one cache line

  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace efft::EFFT_ISA
