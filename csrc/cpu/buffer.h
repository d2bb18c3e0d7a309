// Memory of one thread that is kept from call to call. Not a std::vector: its functions would be compiled once an
// instruction set under one name, and the linker, which keeps any one of them, could give a processor code that it
// lacks.
#pragma once

#include <cstdint>
#include <new>

namespace efft::EFFT_ISA {

// Grown, never shrunk: a fresh allocation of this size would fault in its pages on every call.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete[](data_, ALIGNED); }

  // Room for `size` elements, whatever is in it.
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
  static constexpr std::align_val_t ALIGNED{64};  // a register, and a row of a tile, lie in one line of the cache

  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace efft::EFFT_ISA
