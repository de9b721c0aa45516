# builds only llama-server, not all of LLAMA_BUILD_COMMON and LLAMA_BUILD_TOOLS; included by llama.cpp's CMakeLists.txt
set(BUILD_SHARED_LIBS OFF) # one executable

foreach (dir vendor/cpp-httplib common tools/mtmd tools/ui tools/server)
    add_subdirectory(${dir} EXCLUDE_FROM_ALL)
endforeach()
set_target_properties(llama-server PROPERTIES EXCLUDE_FROM_ALL OFF)

# to build faster: -O1 is enough because no tensors are computed here; large headers are precompiled
foreach (target cpp-httplib llama-common mtmd server-context llama-server-impl)
    target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>)
endforeach()

file(GLOB models RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} tools/mtmd/models/*.cpp)
set_source_files_properties(${models} TARGET_DIRECTORY mtmd PROPERTIES UNITY_GROUP models)
set_target_properties(mtmd PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)

target_precompile_headers(llama PRIVATE
    src/llama-impl.h <algorithm> <functional> <map> <memory> <regex> <sstream> <unordered_map>)
target_precompile_headers(llama-common   PRIVATE common/common.h common/json.h <regex> <sstream>)
target_precompile_headers(mtmd           PRIVATE tools/mtmd/models/models.h)
target_precompile_headers(server-context PRIVATE tools/server/server-task.h)
set_source_files_properties(tools/mtmd/mtmd-helper.cpp tools/mtmd/mtmd-helper-gen.cpp
    TARGET_DIRECTORY mtmd PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
